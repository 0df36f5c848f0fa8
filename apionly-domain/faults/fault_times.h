#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "apionly-domain/faults/page_request.h"

namespace mvgpu::domain {

// The steps of a fault, one after the other.
enum class FaultStep : uint8_t {
  kReport,  // the device raised it .. it is in a queue
  kQueue,   // .. a handler took it
  kPin,     // the pages that it needs are pinned
  kMap,     // the device's tables show them
  kResume,  // the handler answered .. the device knows
};
inline constexpr size_t kFaultSteps = 5;
constexpr std::string_view FaultStepName(FaultStep step) {
  constexpr std::array<std::string_view, kFaultSteps> kNames{"report", "queue", "pin", "map",
                                                             "resume"};
  return kNames[static_cast<size_t>(step)];
}

// Where the time of faults goes. Thread-safe; sums of one step belong together only when no fault
// is under way.
class FaultTimes {
 public:
  struct Figures {
    uint64_t count = 0;
    uint64_t total_ns = 0;
    uint64_t longest_ns = 0;
  };

  void add(FaultStep step, FaultClock::duration took) {
    const auto ns = static_cast<uint64_t>(
        std::max<int64_t>(0, std::chrono::duration_cast<std::chrono::nanoseconds>(took).count()));
    Sums& sums = sums_[static_cast<size_t>(step)];
    // Relaxed: numbers, nothing is published with them.
    sums.count.fetch_add(1, std::memory_order_relaxed);
    sums.total_ns.fetch_add(ns, std::memory_order_relaxed);
    uint64_t longest = sums.longest_ns.load(std::memory_order_relaxed);
    while (longest < ns &&
           !sums.longest_ns.compare_exchange_weak(longest, ns, std::memory_order_relaxed)) {
    }
  }
  Figures of(FaultStep step) const {
    const Sums& sums = sums_[static_cast<size_t>(step)];
    return {sums.count.load(std::memory_order_relaxed),
            sums.total_ns.load(std::memory_order_relaxed),
            sums.longest_ns.load(std::memory_order_relaxed)};
  }

 private:
  struct Sums {
    std::atomic<uint64_t> count{0};
    std::atomic<uint64_t> total_ns{0};
    std::atomic<uint64_t> longest_ns{0};
  };
  std::array<Sums, kFaultSteps> sums_;
};

}  // namespace mvgpu::domain
