#pragma once

#include <memory>
#include <string_view>

#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/pin/pinned_range.h"

namespace mvgpu::dma {

// Who moves the data: a device that reads guest memory, writes it, or both (the kernel's
// DMA_TO_DEVICE, DMA_FROM_DEVICE, DMA_BIDIRECTIONAL).
enum class Direction : uint8_t { kToDevice, kFromDevice, kBidirectional };

// The stand-in for dma_map_page(): gives a device's view of pinned guest pages. Called by the cache
// only, once per page and with its lock held; a run has contiguous backing, the result is
// contiguous too.
class Mapper {
 public:
  virtual ~Mapper() = default;
  virtual std::string_view name() const = 0;
  // Errors: kLimit, kSystem. Nothing is mapped then.
  virtual Result<DmaAddr> map(const domain::PinnedRun& run, Direction direction) = 0;
  // REQUIRES: [address, address + size) was mapped, in one piece or in any cut of it.
  virtual void unmap(DmaAddr address, uint64_t size) = 0;
};

// For a device that shares this process's address space (CPU renderers): the host pointer.
std::unique_ptr<Mapper> MakeNoneMapper();

}  // namespace mvgpu::dma
