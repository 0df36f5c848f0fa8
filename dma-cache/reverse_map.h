#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include <absl/container/btree_set.h>

#include "apionly-domain/base/address.h"
#include "dma-cache/page_map.h"

namespace mvgpu::dma {

// Which IOVA pages have a device page behind them: one as a rule, more where the VMM shows a page
// of memory at several IOVAs. Runs cost what they cost a PageMap, single pages 4 bytes each; the
// second and further IOVAs of a device page stand in a set beside.
//
// Not thread-safe.
class ReverseMap {
 public:
  // Pages are numbers: addresses without their lowest 12 bits.
  void add(PageRun iova, uint64_t device) {
    if (iova.count != 1 || !first_.try_map(device, iova.first, PageMapFlags::kRead)) {
      AddRun(iova, device);
    }
  }
  // REQUIRES: added before, as a whole or in any cut.
  void remove(PageRun iova, uint64_t device) {
    if (others_.empty()) {
      first_.unmap({device, iova.count});
    } else {
      for (uint64_t i = 0; i < iova.count; ++i) RemoveOne(iova.first + i, device + i);
    }
    if (first_.has_retired()) first_.reclaim();  // read by nobody else
  }
  // See PageMap::prefetch().
  [[gnu::always_inline]] void prefetch(uint64_t device) const { first_.prefetch(device); }
  // Calls visit(IOVA page) for those behind a device page.
  template <typename Visit>
  void for_each(uint64_t device, Visit visit) const;

 private:
  void AddRun(PageRun iova, uint64_t device);
  void RemoveOne(uint64_t iova, uint64_t device);

  PageMap<HeapLeaves<PackedPages>> first_;
  absl::btree_set<std::pair<uint64_t, uint64_t>> others_;  // device page, IOVA page
  std::vector<PageRun> free_;                              // kept, so that adding allocates nothing
};

template <typename Visit>
void ReverseMap::for_each(uint64_t device, Visit visit) const {
  const auto found = first_.find(device);
  if (found.word == 0) return;
  visit(found.target());
  if (others_.empty()) return;
  for (auto it = others_.lower_bound({device, 0}); it != others_.end() && it->first == device;
       ++it) {
    visit(it->second);
  }
}

}  // namespace mvgpu::dma
