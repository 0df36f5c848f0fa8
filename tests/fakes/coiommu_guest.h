#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <span>
#include <utility>
#include <vector>

#include "apionly-domain/base/check.h"
#include "tests/fakes/guest_ram.h"

namespace mvgpu::testing {

// The coIOMMU driver of a guest: keeps the tracking table in its RAM, counts what its drivers map,
// and asks the host for what is not pinned. Guest-physical address 0 is byte 0 of the RAM.
//
// map() and unmap() may be called by several threads once the words of their frames exist
// (prepare()).
class CoiommuGuest {
 public:
  static constexpr uint32_t kAccessed = 1u << 30;
  static constexpr uint32_t kPinned = 1u << 31;

  // `ask` hands a request to the host and returns when the host has handled it; the batch is at
  // `batch`. Tables are taken from `tables` on, the root first.
  struct Options {
    uint64_t tables = 0;
    uint64_t batch = 0;
    unsigned levels = 4;
    unsigned cpus = 16;
    uint16_t device = 0x28;
    std::function<void(uint64_t request)> ask;
  };
  CoiommuGuest(GuestRam* ram, Options options)
      : ram_(*ram), options_(std::move(options)), next_table_(options_.tables + 0x1000) {}

  uint64_t root() const { return options_.tables; }
  uint64_t notifications() const { return notifications_; }
  uint64_t maps() const { return maps_; }

  // Where the word of a frame is, with all tables on the way.
  std::atomic_ref<uint32_t> word(uint64_t frame) {
    uint64_t table = options_.tables;
    for (unsigned level = options_.levels - 1; level > 0; --level) {
      const uint64_t index = frame >> (10 + 9 * (level - 1)) & 511;
      auto& entry = *reinterpret_cast<uint64_t*>(ram_.at(table + index * 8));
      std::atomic_ref<uint64_t> shared(entry);
      if (shared.load() == 0) {
        shared.store(next_table_ | 1);
        next_table_ += 0x1000;
        MVGPU_CHECK(next_table_ <= ram_.size());
      }
      table = shared.load() & ~uint64_t{0xfff};
    }
    return std::atomic_ref<uint32_t>(
        *reinterpret_cast<uint32_t*>(ram_.at(table + (frame & 1023) * 4)));
  }
  void prepare(uint64_t first, uint64_t count) {
    for (uint64_t i = 0; i < count; ++i) word(first + i);
  }

  // A driver maps these frames for a device. False: at least one cannot be pinned; then none is
  // mapped.
  bool map(std::span<const uint64_t> frames) {
    ++maps_;
    std::vector<uint64_t> missing;
    for (size_t i = 0; i < frames.size(); ++i) {
      std::atomic_ref<uint32_t> shared = word(frames[i]);
      uint32_t there = shared.load();
      do {
        if ((there & 0xffff) >= most_maps()) {
          unmap(frames.first(i));
          return false;
        }
      } while (!shared.compare_exchange_weak(there, (there + 1) | kAccessed));
      if ((there & kPinned) == 0) missing.push_back(frames[i]);
    }
    if (missing.empty()) return true;
    Ask(missing);
    for (const uint64_t frame : missing) {
      if ((word(frame).load() & kPinned) != 0) continue;
      unmap(frames);
      return false;
    }
    return true;
  }
  bool map(uint64_t frame) { return map(std::span(&frame, 1)); }
  void unmap(std::span<const uint64_t> frames) {
    for (const uint64_t frame : frames) word(frame).fetch_sub(1);
  }
  void unmap(uint64_t frame) { unmap(std::span(&frame, 1)); }

  uint32_t most_maps() const { return 0xffff - options_.cpus; }

 private:
  void Ask(const std::vector<uint64_t>& frames) {
    ++notifications_;
    if (frames.size() == 1) return options_.ask(frames[0] << 16 | options_.device);
    ram_.put(options_.batch, uint64_t{options_.device});
    ram_.put(options_.batch + 8, uint64_t{frames.size()});
    for (size_t i = 0; i < frames.size(); ++i) ram_.put(options_.batch + 16 + i * 8, frames[i]);
    options_.ask(options_.batch | uint64_t{1} << 63);
  }

  GuestRam& ram_;
  const Options options_;
  uint64_t next_table_;
  std::atomic<uint64_t> notifications_{0};
  std::atomic<uint64_t> maps_{0};
};

}  // namespace mvgpu::testing
