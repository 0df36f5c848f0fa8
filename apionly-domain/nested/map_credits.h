#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "apionly-domain/base/check.h"

namespace mvgpu::domain {

// How many pages the nested domains of a VM may have mapped together, as VFIO's dma_entry_limit
// bounds those of a container. Thread-safe.
class MapCredits {
 public:
  static constexpr uint64_t kVfioDefault = 65535;
  explicit MapCredits(uint64_t pages = kVfioDefault) : limit_(pages), available_(pages) {}
  // REQUIRES: all credits are back.
  ~MapCredits() { MVGPU_CHECK(available() == limit_); }
  MapCredits(const MapCredits&) = delete;
  MapCredits& operator=(const MapCredits&) = delete;

  // As many of the wanted ones as there are.
  uint64_t take(uint64_t wanted) {
    uint64_t there = available();
    uint64_t taken = 0;
    do {
      taken = std::min(wanted, there);
    } while (taken != 0 &&
             !available_.compare_exchange_weak(there, there - taken, std::memory_order_relaxed));
    return taken;
  }
  void give_back(uint64_t pages) { available_.fetch_add(pages, std::memory_order_relaxed); }
  uint64_t available() const { return available_.load(std::memory_order_relaxed); }

 private:
  const uint64_t limit_;
  std::atomic<uint64_t> available_;  // relaxed: a number, nothing is published with it
};

}  // namespace mvgpu::domain
