#pragma once

// What is mapped, as simply as it can be said. Shares no code with the domain but the names of
// errors and kinds of access. All numbers are pages.

#include <compare>
#include <cstdint>
#include <map>
#include <optional>
#include <vector>

#include "apionly-domain/access.h"
#include "apionly-domain/base/error.h"

namespace mvgpu::domain::model {

inline constexpr int kNoFile = -1;

// A page of memory, whatever IOVAs show it. Memory without a file: file kNoFile, page of the IOVA.
struct Backing {
  int file = kNoFile;
  uint64_t page = 0;
  auto operator<=>(const Backing&) const = default;
};

struct NaiveMapping {
  uint64_t first = 0;
  uint64_t count = 0;
  Access access = Access::kReadWrite;
  int file = kNoFile;
  uint64_t file_page = 0;

  uint64_t end() const { return first + count; }
  Backing backing(uint64_t page) const {
    return file == kNoFile ? Backing{kNoFile, page} : Backing{file, file_page + (page - first)};
  }
  bool operator==(const NaiveMapping&) const = default;
};

// What an operation is to answer: an error, or nothing for a success.
using Verdict = std::optional<ErrorCode>;

class NaiveMemory {
 public:
  // Small, so that steps run into them.
  static constexpr uint64_t kMostMerged = 14;
  static constexpr uint64_t kMostPieces = 20;
  static constexpr uint64_t kMostFilePages = (uint64_t{1} << 18) + 3000;

  const NaiveMapping* at(uint64_t page) const;
  std::vector<NaiveMapping> all() const;

  // Whether the mapping could be added, and whether it is there already.
  Verdict verdict_on_map(const NaiveMapping& wanted, bool* is_there) const;
  void add(const NaiveMapping& mapping) { mappings_[mapping.first] = mapping; }

  // What an unmap of the pages takes away; `verdict` says why it may not.
  std::vector<NaiveMapping> going(uint64_t first, uint64_t count, bool may_split,
                                  Verdict* verdict) const;
  void remove(const std::vector<NaiveMapping>& parts);

  // The answer to an access to the pages: that of the first one that does not allow it. `going`
  // are about to be unmapped; `remote`: memory without a file can be reached.
  Verdict verdict_on_access(uint64_t first, uint64_t count, Access access, bool remote,
                            const std::vector<NaiveMapping>& going) const;

  uint64_t pieces() const { return mappings_.size(); }
  uint64_t merged() const;
  uint64_t pages() const;
  uint64_t file_pages() const;
  uint64_t files() const;

 private:
  std::map<uint64_t, NaiveMapping> mappings_;  // by first page
};

}  // namespace mvgpu::domain::model
