#pragma once

#include <cstdint>
#include <istream>
#include <string>

#include "apionly-domain/base/error.h"
#include "backend/policies/dma_trace.h"

namespace mvgpu::backend {

// The DMA of a guest, from the kernel's dma:* events (include/trace/events/dma.h, Linux 6.12 to
// 7.2) as ftrace, `trace-cmd report` or `perf script` print them; the guest must use the DMA API
// for the device, which virtio does with ACCESS_PLATFORM only.
//
//   dma_map_page, dma_map_phys        a buffer at phys_addr is mapped, and the device touches it
//   dma_map_sg                        the same for a list
//   dma_unmap_page, _phys, _sg        found again by device and address
//   dma_sync_single_for_cpu, _device  the device touches the buffer again
//
// Skipped and counted: dma_alloc and dma_free (they do not say a physical address), memory of
// devices (attrs with MMIO; dma_map_resource), unmaps and syncs of what was mapped before the trace
// began, lists of which the kernel printed a part, and directions of NONE. Other events and lines
// are passed over.
struct DmaTextOptions {
  // Bytes of guest memory, laid out as PcMemory() does; 0: as much as the highest buffer needs, in
  // whole GiB.
  uint64_t memory = 0;
};
// `name` stands in messages. Errors: kCorrupt, with the line, or where there is no dma event at
// all; those of DmaTraceBuilder.
Result<DmaTrace> ImportDmaText(std::istream& lines, const std::string& name,
                               DmaTextOptions options);

}  // namespace mvgpu::backend
