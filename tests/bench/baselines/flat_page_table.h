#pragma once

#include <cstdint>
#include <vector>

#include "apionly-domain/base/address.h"

namespace mvgpu::bench {

// One 8-byte entry for each page of the guest (128 MiB for 64 GiB): the fastest table that stores
// an address per page, as a shadow page table or SPDK's second level (SPDK's vtophys with 4 KiB
// entries has this load and two before it).
class FlatPageTable {
 public:
  explicit FlatPageTable(uint64_t pages) : entries_(pages) {
    for (uint64_t page = 0; page < pages; ++page) entries_[page] = BytesIn(page) | 3;
  }
  uint64_t translate(Iova iova) const { return entries_[iova.page()]; }

 private:
  std::vector<uint64_t> entries_;
};

}  // namespace mvgpu::bench
