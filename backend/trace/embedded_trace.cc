#include "backend/trace/embedded_trace.h"

// Defined in embedded_trace_data.S.
extern "C" const std::byte mvgpu_embedded_trace_begin[];
extern "C" const std::byte mvgpu_embedded_trace_end[];

namespace mvgpu::backend {

std::span<const std::byte> EmbeddedTrace() {
  return {mvgpu_embedded_trace_begin, mvgpu_embedded_trace_end};
}

}  // namespace mvgpu::backend
