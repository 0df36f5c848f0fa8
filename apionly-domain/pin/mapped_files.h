#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include <absl/container/btree_map.h>
#include <absl/container/btree_set.h>
#include <absl/container/flat_hash_map.h>

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
  // What find() and views() go by is kept only where it is `indexed`: it is an insertion more for
  // each mapping.
  explicit MappedFiles(bool indexed) : is_indexed_(indexed) {}

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
  // The same, also where each page is mapped once. REQUIRES: indexed.
  std::vector<View> views(const FilePages& pages) const;
  // Null when no page of it is mapped. REQUIRES: indexed.
  const GuestFile* find(const FileIdentity& identity) const;

 private:
  struct File {
    const GuestFile* file = nullptr;
    absl::btree_map<uint64_t, View> views;  // by first IOVA page
    RunCounter mapped;                      // how often each page is mapped
    // Of views, if indexed: the file page and the IOVA page where each begins.
    absl::btree_set<std::pair<uint64_t, uint64_t>> by_file_page;
    bool contains(const std::byte* host) const {
      return static_cast<uint64_t>(host - file->host_address(0)) < file->size();
    }
  };
  const File& FileAt(const std::byte* host) const {
    return last_ != nullptr && last_->contains(host) ? *last_ : FindFileAt(host);
  }
  const File& FindFileAt(const std::byte* host) const;
  void AddView(File& file, const View& view);
  // The part of a view that shows some of the pages, if any.
  static void AppendPart(const View& view, PageRun pages, std::vector<View>* found);

  const bool is_indexed_;
  absl::btree_map<const std::byte*, File> files_;  // by host address
  // The keys of files_, if indexed.
  absl::flat_hash_map<FileIdentity, const std::byte*> by_identity_;
  // The file that was asked for last: the next question is nearly always about the same.
  mutable const File* last_ = nullptr;
};

}  // namespace mvgpu::domain
