#pragma once

// Hands out IOVAs of a device: ranges that nobody uses, inside those that its IOMMU can translate.
//
//   Where   From the top down, first below `prefer_below` (by default 4 GiB, as the kernel's DMA
//           API does, for devices that cannot count further), then anywhere. Page 0 is never
//           handed out, only reserved: a device address of 0 looks like none.
//   Next    The search goes on below the range handed out last and starts again at the top when
//           it has reached the bottom. So a range that was freed is not handed out again before
//           all free space below the last one has been tried: a device that still uses an old
//           address meets a fault, not somebody else's page.
//   Align   A range of 2 MiB or more is congruent to the host address behind it modulo the largest
//           page size of the IOMMU that it can hold, so that large pages stay large; where no such
//           place is free, any place will do.
//
// A search looks at the free stretches one by one, as the kernel's does.

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include <absl/container/btree_map.h>

#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"

namespace mvgpu::domain {

// Not thread-safe.
class IovaAllocator {
 public:
  static constexpr Iova kBelow4G{uint64_t{1} << 32};

  // `usable` in order and disjoint, `page_sizes` as of AssignedIommu.
  IovaAllocator(std::span<const IovaRange> usable, uint64_t page_sizes,
                Iova prefer_below = kBelow4G);

  // `size` bytes, whole pages, for host memory that begins at `host`. Errors: kLimit.
  Result<IovaRange> allocate(uint64_t size, const std::byte* host);
  // Takes a given range out of what allocate() may hand out. Whole pages. Errors: kNotReachable
  // (not inside the usable ranges), kOverlap (handed out or reserved already); nothing is taken
  // then.
  Result<void> reserve(IovaRange range);
  // REQUIRES: allocated or reserved, as a whole or in any cut or union.
  void free(IovaRange range);

  uint64_t free_pages() const { return free_pages_; }

 private:
  // Page numbers that are `rest` modulo `modulus`.
  struct Congruence {
    uint64_t modulus = 1;
    uint64_t rest = 0;
  };
  // Page numbers below `end`; the search goes on below `next`.
  struct Zone {
    uint64_t end;
    uint64_t next;
  };
  using Runs = absl::btree_map<uint64_t, uint64_t>;  // first page -> page behind; disjoint

  Congruence WishFor(uint64_t pages, const std::byte* host) const;
  std::optional<uint64_t> Find(Zone& zone, uint64_t pages, Congruence wish);
  std::optional<uint64_t> FindBelow(uint64_t end, uint64_t pages, Congruence wish) const;
  bool IsUsable(IovaRange range) const;
  void Take(PageRun pages);  // REQUIRES: free
  tl::unexpected<Error> FullError(uint64_t size) const;

  const std::vector<IovaRange> usable_;
  const uint64_t page_sizes_;
  Runs free_;
  uint64_t free_pages_ = 0;
  Zone low_;
  Zone whole_;
};

}  // namespace mvgpu::domain
