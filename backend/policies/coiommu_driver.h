#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "apionly-domain/base/address.h"
#include "apionly-domain/coiommu/tracking_table.h"

namespace mvgpu::backend {

// The guest's half of coIOMMU, for policies that are played without a guest: it keeps the tracking
// table in guest memory, counts in it what drivers map, and rings the host for pages that do not
// say PINNED. Its memory begins with the root of the table, zeroed. Not thread-safe; the host may
// change the words meanwhile.
class CoiommuDriver {
 public:
  struct Options {
    Iova start;                   // guest-physical, of `memory`; page-aligned
    std::span<std::byte> memory;  // MemoryFor() bytes at least; outlives the driver
    unsigned levels = 0;
    uint16_t device = 0;  // whose DMA it is
    // Hands a request to the host and returns when it has been handled.
    std::function<void(uint64_t request)> ask;
  };
  // Enough for all tables of that many guest pages, and for batches.
  static uint64_t MemoryFor(uint64_t pages, unsigned levels);

  explicit CoiommuDriver(Options options);

  // A driver maps these pages for the device. False: the host would not pin one of them, or it is
  // mapped too often; nothing is mapped then.
  bool map(std::span<const PageRun> frames);
  void unmap(std::span<const PageRun> frames);

  uint64_t notifications() const { return notifications_; }

 private:
  static constexpr uint64_t kMaxBatch = 4096;  // frames

  std::atomic_ref<uint64_t> WordAt(uint64_t offset) const;
  std::atomic_ref<uint32_t> TrackedWord(uint64_t frame);
  bool Count(std::span<const PageRun> frames);
  void Ask(std::span<const uint64_t> frames);

  const Options options_;
  uint64_t next_table_;  // offsets
  const uint64_t batch_;
  std::vector<uint64_t> missing_;  // kept, so that maps allocate nothing
  uint64_t notifications_ = 0;
};

}  // namespace mvgpu::backend
