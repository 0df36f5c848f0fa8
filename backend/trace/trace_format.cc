#include "backend/trace/trace_format.h"

namespace mvgpu::backend {

std::string_view TraceTypeName(TraceType type) {
  switch (type) {
    case TraceType::kSession:
      return "session";
    case TraceType::kMap:
      return "map";
    case TraceType::kUnmap:
      return "unmap";
    case TraceType::kUnmapAll:
      return "unmap_all";
    case TraceType::kWrite:
      return "register_write";
    case TraceType::kRead:
      return "register_read";
    case TraceType::kIrqs:
      return "irqs";
    case TraceType::kReset:
      return "reset";
    case TraceType::kMemory:
      return "guest_memory";
    case TraceType::kStep:
      return "step";
    case TraceType::kRequest:
      return "request";
    case TraceType::kResponse:
      return "response";
    case TraceType::kFrame:
      return "frame";
    case TraceType::kSummary:
      return "summary";
    case TraceType::kAccounts:
      return "accounts";
  }
  return "unknown";
}

}  // namespace mvgpu::backend
