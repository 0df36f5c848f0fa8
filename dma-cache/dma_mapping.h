#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include "apionly-domain/access.h"
#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "dma-cache/mapper.h"

namespace mvgpu::dma {

class DmaUser;

// Who moves the data: a device that reads guest memory, writes it, or both (the kernel's
// DMA_TO_DEVICE, DMA_FROM_DEVICE, DMA_BIDIRECTIONAL).
enum class Direction : uint8_t { kToDevice, kFromDevice, kBidirectional };

constexpr domain::Access AccessFor(Direction direction) {
  constexpr domain::Access kAccess[] = {domain::Access::kRead, domain::Access::kWrite,
                                        domain::Access::kReadWrite};
  return kAccess[static_cast<size_t>(direction)];
}
constexpr bool IsForWrite(Direction direction) { return direction != Direction::kToDevice; }

using MappedRuns = domain::RunList<MappedRun>;

// One use of a range of guest memory by a device: a hold of each of its pages. Move-only; the
// destructor gives the holds up. Its addresses mean nothing once it was revoked. Not thread-safe
// itself; different ones of a user may be used by different threads.
class DmaMapping {
 public:
  DmaMapping() = default;
  DmaMapping(DmaMapping&& other) noexcept
      : user_(other.user_),
        epoch_(other.epoch_),
        for_write_(other.for_write_),
        runs_(std::exchange(other.runs_, {})) {}
  DmaMapping& operator=(DmaMapping&& other) noexcept;
  DmaMapping(const DmaMapping&) = delete;
  DmaMapping& operator=(const DmaMapping&) = delete;
  ~DmaMapping() {
    if (!runs_.empty()) reset();
  }

  // Whole pages, in ascending IOVA order, without gaps; neighbours do not continue each other.
  std::span<const MappedRun> runs() const { return runs_.span(); }
  bool empty() const { return runs_.empty(); }

  // False once any page of it was revoked.
  bool is_valid() const;
  // Copies guest bytes out. Errors: kInvalid (outside the mapping), kRevoked, and those of
  // ApiOnlyDomain::read(); something undefined was copied then.
  Result<void> read(Iova iova, std::span<std::byte> destination) const;
  void reset();

 private:
  friend class DmaUser;

  // REQUIRES: not empty.
  PageRun pages() const {
    const uint64_t first = runs().front().iova.start().page();
    return {first, runs().back().iova.last().page() - first + 1};
  }

  DmaUser* user_ = nullptr;  // outlives its mappings: checked in its destructor
  uint64_t epoch_ = 0;       // of the user, when this was made
  bool for_write_ = false;
  MappedRuns runs_;
};

}  // namespace mvgpu::dma
