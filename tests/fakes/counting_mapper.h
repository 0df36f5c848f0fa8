#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <string_view>
#include <vector>

#include "apionly-domain/base/check.h"
#include "dma-cache/mapper.h"

namespace mvgpu::testing {

// Hands out device addresses of its own, checks every unmap against them, and can fail at the n-th
// call.
class CountingMapper final : public dma::Mapper {
 public:
  std::string_view name() const override { return "counting"; }

  Result<void> map(std::span<const domain::PinnedRun> runs, domain::Access,
                   std::vector<dma::MappedRun>* mapped) override {
    ++map_calls;
    if (fail_at_call != 0 && --fail_at_call == 0)
      return Fail(ErrorCode::kLimit, "fake mapper is full");
    for (const domain::PinnedRun& run : runs) {
      mapped->push_back({run.iova, DmaAddr(next_)});
      for (uint64_t i = 0; i < PagesIn(run.iova.size()); ++i) {
        const uint64_t iova_page = run.iova.start().page() + i;
        ++maps_of_page[iova_page];
        mapped_[next_ + BytesIn(i)] = iova_page;
      }
      next_ += run.iova.size() + 16 * kPageSize;  // never contiguous by accident
    }
    return {};
  }

  void unmap(DmaAddr address, uint64_t size) override {
    if (on_unmap) on_unmap();
    for (uint64_t i = 0; i < PagesIn(size); ++i) {
      MVGPU_CHECK(mapped_.erase(address.value() + BytesIn(i)) == 1);  // never twice, never unknown
    }
  }

  uint64_t mapped_pages() const { return mapped_.size(); }
  // The IOVA page behind a device address. REQUIRES: mapped.
  uint64_t iova_page_at(DmaAddr address) const { return mapped_.at(address.value()); }

  uint64_t map_calls = 0;
  uint64_t fail_at_call = 0;                  // 1 = the next one; 0 = never
  std::map<uint64_t, uint64_t> maps_of_page;  // IOVA page -> times mapped, ever
  std::function<void()> on_unmap;

 private:
  uint64_t next_ = uint64_t{1} << 40;
  std::map<uint64_t, uint64_t> mapped_;  // device page address -> IOVA page
};

}  // namespace mvgpu::testing
