#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>

#include "apionly-domain/base/address.h"

namespace mvgpu::bench {

// One counter for each page of the guest, in one array: what pin + release costs when nothing is
// checked, looked up or locked. 8 bytes are GVT-g's and type1's counts, without the trees that lead
// to them.
class FlatCounters {
 public:
  explicit FlatCounters(uint64_t pages) : counts_(new uint64_t[pages]()) {}

  void pin(std::span<const Iova> pages) {
    for (const Iova page : pages) ++counts_[page.page()];
  }
  void release(std::span<const Iova> pages) {
    for (const Iova page : pages) --counts_[page.page()];
  }

 private:
  std::unique_ptr<uint64_t[]> counts_;
};

// The same for several threads at a time without a lock: two lock xadd for each page, prefetched
// for a batch, since a lock-prefixed instruction waits for its cache line and the next one for it.
template <typename Count>
class AtomicCounters {
 public:
  explicit AtomicCounters(uint64_t pages) : counts_(new std::atomic<Count>[pages]()) {}

  void pin_and_release(std::span<const Iova> pages) {
    for (const Iova page : pages) __builtin_prefetch(&counts_[page.page()], /*rw=*/1);
    for (const Iova page : pages) counts_[page.page()].fetch_add(1, std::memory_order_acquire);
    for (const Iova page : pages) counts_[page.page()].fetch_sub(1, std::memory_order_release);
  }

 private:
  std::unique_ptr<std::atomic<Count>[]> counts_;
};

}  // namespace mvgpu::bench
