#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "apionly-domain/base/error.h"
#include "backend/policies/dma_trace.h"
#include "backend/policies/policy_run.h"
#include "backend/trace/trace_reader.h"
#include "backend/vgpu_config.h"

namespace mvgpu::backend {

// `mvgpu-replay compare`: the same DMA under several pinning policies (policies/), side by side.

struct CompareOptions {
  std::string trace{};     // a session's trace, or text with dma:* events
  std::string workload{};  // or a generated one
  std::string policies{};  // names with commas; empty: all
  uint64_t memory = 0;     // bytes; 0: what the trace needs
  PinMode pin = PinMode::kNone;
  bool as_json = false;
};
// `options` is the default and outlives the parsing.
CLI::App* AddCompareCommand(CLI::App& app, CompareOptions& options);

// What is compared. With neither a trace nor a workload: `builtin`. Errors: kSystem (cannot be
// read), those of the importers; kInvalid where options do not go together.
Result<DmaTrace> LoadDma(const CompareOptions& options,
                         const std::function<Result<std::unique_ptr<TraceReader>>()>& builtin);

struct Compared {
  std::string policy;
  Result<PolicyFigures> figures;
};
// Errors: kInvalid (a name).
Result<std::vector<Compared>> Compare(const CompareOptions& options, const DmaTrace& trace);

std::string CompareTable(const DmaTrace& trace, const std::vector<Compared>& rows, PinMode pin);
std::string CompareJson(const DmaTrace& trace, const std::vector<Compared>& rows, PinMode pin);

}  // namespace mvgpu::backend
