#include "dma-cache/reverse_map.h"

#include "apionly-domain/base/check.h"

namespace mvgpu::dma {

void ReverseMap::AddRun(PageRun iova, uint64_t device) {
  uint64_t at = device;
  const uint64_t end = device + iova.count;
  free_.clear();
  first_.for_each({device, iova.count}, [&](const auto& taken) {
    if (taken.pages.first > at) free_.push_back({at, taken.pages.first - at});
    at = taken.pages.end();
    for (uint64_t page = taken.pages.first; page < at; ++page) {
      others_.emplace(page, iova.first + (page - device));
    }
  });
  if (at < end) free_.push_back({at, end - at});
  for (const PageRun& run : free_) {
    first_.map(run, iova.first + (run.first - device), PageMapFlags::kRead);
  }
}

void ReverseMap::RemoveOne(uint64_t iova, uint64_t device) {
  if (first_.find(device).target() != iova) {
    MVGPU_CHECK(others_.erase({device, iova}) == 1);
    return;
  }
  first_.unmap({device, 1});
  const auto next = others_.lower_bound({device, 0});
  if (next == others_.end() || next->first != device) return;
  first_.map({device, 1}, next->second, PageMapFlags::kRead);
  others_.erase(next);
}

}  // namespace mvgpu::dma
