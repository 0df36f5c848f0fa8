#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "backend/policies/counting_pin_backend.h"
#include "backend/policies/dma_trace.h"
#include "backend/policies/pinning_policy.h"

namespace mvgpu::backend {

// What one policy did with a trace.
struct PolicyFigures {
  PinFigures pins;
  uint64_t duration_ns = 0;  // of the trace
  uint64_t maps = 0;
  uint64_t accesses = 0;
  uint64_t notifications = 0;
  // After PolicyRunOptions::warm_up.
  uint64_t warm_maps = 0;
  uint64_t warm_notifications = 0;
  // The policy's own time for one access of the device: the access, and the maps, unmaps and scans
  // since the access before. Not the same from run to run.
  double mean_access_ns = 0;
  uint64_t p99_access_ns = 0;

  double mean_pinned_pages() const;  // over the time of the trace
  // Share of the maps after the warm-up that told nobody, 0 to 1; negative where several
  // notifications come for a map.
  double suppressed_share() const;
};

struct PolicyRunOptions {
  std::chrono::seconds warm_up{0};
};

// Plays the trace to a policy by that name, and has the device look whether it reaches, at each
// access, the very page that it means. Errors: those of the policy; kNotReachable, where the device
// ends up elsewhere; kBusy, where something stays pinned. Everything is let go in any case.
// REQUIRES: the name is one of PolicyNames().
Result<PolicyFigures> RunPolicy(std::string_view name, const DmaTrace& trace,
                                std::unique_ptr<domain::PinBackend> backend,
                                PolicyRunOptions options = {});

}  // namespace mvgpu::backend
