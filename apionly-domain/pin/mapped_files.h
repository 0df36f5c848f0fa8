#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include <absl/container/btree_map.h>

#include "apionly-domain/base/address.h"
#include "apionly-domain/domain.h"
#include "apionly-domain/memory/guest_file.h"
#include "apionly-domain/pin/run_counter.h"

namespace mvgpu::domain {

// Pages of a file: what pins and charges are about.
struct FilePages {
  const GuestFile* file;  // lives as long as a mapping of it does, and a pin keeps its mapping
  PageRun pages;
};

// Which pages of which files are mapped at which IOVAs: finds the identity of a page from its host
// address, and the other IOVAs that show it.
//
// Not thread-safe.
class MappedFiles {
 public:
  void add(const Mapping& mapping);     // REQUIRES: mapping.file
  void remove(const Mapping& mapping);  // REQUIRES: added before, as a whole or in any cut

  // The pages from a host address on that lie in one file, at most `pages` of them.
  // REQUIRES: the address belongs to a mapping.
  FilePages at(const std::byte* host, uint64_t pages) const;

  // Stretches of IOVA pages that show pages of a file.
  struct View {
    PageRun iova;
    uint64_t file_page;  // that iova.first shows
  };
  // Whether any page of the file, and be it another one, is mapped twice.
  bool has_aliases(const GuestFile& file) const {
    const RunCounter& mapped = FileAt(file.host_address(0)).mapped;
    return mapped.total() != mapped.unique_pages();
  }
  // All views of the pages, cut down to them; empty when no page of the file is mapped twice.
  std::vector<View> aliases(const FilePages& pages) const;

 private:
  struct File {
    const GuestFile* file = nullptr;
    absl::btree_map<uint64_t, View> views;  // by first IOVA page
    RunCounter mapped;                      // how often each page is mapped
    bool contains(const std::byte* host) const {
      return static_cast<uint64_t>(host - file->host_address(0)) < file->size();
    }
  };
  const File& FileAt(const std::byte* host) const {
    return last_ != nullptr && last_->contains(host) ? *last_ : FindFileAt(host);
  }
  const File& FindFileAt(const std::byte* host) const;

  absl::btree_map<const std::byte*, File> files_;  // by host address
  // The file that was asked for last: the next question is nearly always about the same.
  mutable const File* last_ = nullptr;
};

}  // namespace mvgpu::domain
