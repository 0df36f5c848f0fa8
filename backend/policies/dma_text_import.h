#pragma once

#include <cstdint>
#include <istream>
#include <string>
#include <string_view>

#include "apionly-domain/base/error.h"
#include "backend/policies/dma_trace.h"

namespace mvgpu::backend {

// The DMA of a guest, from its kernel's events as ftrace, `trace-cmd report` or `perf script` print
// them (kernel_text.h). What is taken of which event stands with each family: dma_api_events.h for
// dma:*, iommu_map_events.h for iommu:*, page_request_events.h for intel_iommu:*. What says too
// little is left out and counted by its name; what two families tell of is taken once, and counted.
// Other events and lines are passed over.
struct DmaTextOptions {
  // Bytes of guest memory, laid out as PcMemory() does; 0: as much as the highest buffer needs, in
  // whole GiB. Pages behind page requests are on top of it.
  uint64_t memory = 0;
};
// How to get such a text, for messages and help.
inline constexpr std::string_view kHowToRecordDma =
    "trace-cmd record -e dma -e iommu -e intel_iommu; trace-cmd report >FILE";

// `name` stands in messages. Errors: kCorrupt, with the line, or where there is none of these
// events at all; those of DmaTraceBuilder.
Result<DmaTrace> ImportDmaText(std::istream& lines, const std::string& name,
                               DmaTextOptions options);

}  // namespace mvgpu::backend
