#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>

#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "backend/policies/dma_trace.h"
#include "backend/policies/iommu_map_events.h"
#include "backend/policies/kernel_text.h"

namespace mvgpu::backend {

// The kernel's dma:* events (include/trace/events/dma.h, Linux 6.12 to 7.2): what the guest's
// drivers ask of the DMA API, which virtio uses with ACCESS_PLATFORM only.
//
//   dma_map_page, dma_map_phys        a buffer at phys_addr is mapped, and the device touches it
//   dma_map_sg                        the same for a list
//   dma_unmap_page, _phys, _sg        found again by device and address
//   dma_sync_single_for_cpu, _device  the device touches the buffer again
//
// Left out: dma_alloc, dma_free and their kin (they do not say a physical address), memory of
// devices (attrs with MMIO; dma_map_resource), unmaps and syncs of what was mapped before the trace
// began, lists of which the kernel printed a part, and directions of NONE.
//
// Behind an IOMMU the kernel tells of a map twice, by iommu:map first. What an IOMMU has mapped
// there at that moment, at the same addresses, is the same buffer: repeated, and nothing new.
class DmaApiEvents {
 public:
  // Both outlive this.
  DmaApiEvents(DmaTraceBuilder* builder, const IommuMapEvents* iommu)
      : builder_(*builder), iommu_(*iommu) {}

  static bool Knows(const KernelEvent& event);
  // Errors: kCorrupt, without the line; those of DmaTraceBuilder. REQUIRES: Knows(event).
  Result<void> take(const KernelEvent& event, uint64_t now_ns);

 private:
  // How a driver finds its mapping again.
  struct Key {
    std::string device;
    uint64_t address = 0;
    auto operator<=>(const Key&) const = default;
  };
  struct Live {
    uint32_t buffer = 0;
    uint64_t first = 0;  // page of the buffer
    uint64_t pages = 0;
    uint64_t bytes = 0;    // from Key::address on
    bool is_told = false;  // the IOMMU maps and unmaps it
  };
  using LiveTable = std::map<Key, Live>;

  Result<void> TakeMap(const KernelEvent& event);
  Result<void> TakeMapList(const KernelEvent& event);
  Result<void> TakeUnmap(const KernelEvent& event);
  Result<void> TakeUnmapList(const KernelEvent& event);
  Result<void> TakeSync(const KernelEvent& event);
  Result<void> Map(Key key, std::span<const IovaRange> ranges, dma::Direction direction,
                   LiveTable* table);
  // What is still there under that key: its unmap was lost.
  Result<void> EndStale(const Key& key, LiveTable* table);
  Result<void> Unmap(LiveTable::iterator found, LiveTable* table);
  Result<void> UnmapOrSkip(const KernelEvent& event, const Key& key, LiveTable* table);
  Result<void> Skip(const KernelEvent& event);

  DmaTraceBuilder& builder_;
  const IommuMapEvents& iommu_;
  uint64_t now_ns_ = 0;
  LiveTable single_;  // by DMA address
  LiveTable lists_;   // by the physical address of the first piece
};

}  // namespace mvgpu::backend
