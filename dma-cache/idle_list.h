#pragma once

#include <cstdint>
#include <vector>

#include <absl/container/btree_map.h>
#include <absl/container/btree_set.h>

#include "apionly-domain/base/address.h"

namespace mvgpu::dma {

// Cached pages that nobody holds, as runs in the order in which they were released.
//
// Not thread-safe.
class IdleList {
 public:
  // At the end that goes last. REQUIRES: none of the pages is in the list.
  void add(PageRun pages);
  // Takes those of the pages that are in the list out of it, and appends them to `taken`.
  void take(PageRun pages, std::vector<PageRun>* taken);
  // Takes at most so many pages out at the end that goes first. REQUIRES: pages() > 0, most > 0.
  PageRun take_oldest(uint64_t most);

  uint64_t pages() const { return pages_; }

 private:
  struct Run {
    uint64_t end;  // page behind the last one
    uint64_t age;  // smaller: older
  };
  void Insert(uint64_t first, Run run);
  void Erase(absl::btree_map<uint64_t, Run>::iterator it);

  absl::btree_map<uint64_t, Run> runs_;                    // by first page; disjoint
  absl::btree_set<std::pair<uint64_t, uint64_t>> by_age_;  // age, first page
  uint64_t next_age_ = 0;
  uint64_t pages_ = 0;
};

}  // namespace mvgpu::dma
