#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <span>

#include "apionly-domain/base/address.h"

namespace mvgpu::domain {

// Who reads translations or copies guest memory at this moment without a pin. An unmap marks its
// range as going, then waits here until nobody uses the range any more: hazard pointers, with
// ranges instead of pointers. So a copy that stands still (a page that has to come from disk) holds
// up the unmap of its own range and nothing else.
//
// A thread takes a slot with one atomic exchange; slots lie on cache lines of their own, and every
// thread has its favourite, so threads do not meet here unless there are more of them than slots.
//
// Thread-safe.
class AccessSlots {
 public:
  using Deadline = std::chrono::steady_clock::time_point;

  AccessSlots() = default;
  AccessSlots(const AccessSlots&) = delete;
  AccessSlots& operator=(const AccessSlots&) = delete;

 private:
  enum State : uint32_t { kFree, kTranslating, kCopying };
  struct alignas(64) Slot {
    std::atomic<uint32_t> state{kFree};
    // Valid while kCopying; two ranges, since a copy may go from guest memory to guest memory.
    // Relaxed: ordered by `state`.
    std::array<std::atomic<uint64_t>, 2> first{};
    std::array<std::atomic<uint64_t>, 2> last{};
  };

 public:
  // A section in which translations that were looked up stay true: every unmap waits for its end.
  // For as short a time as possible; begin_copy() narrows it to the ranges that are copied.
  class Section {
   public:
    explicit Section(AccessSlots& slots) : slot_(slots.Claim()) {}
    ~Section() { slot_->state.store(kFree, std::memory_order_release); }
    Section(const Section&) = delete;
    Section& operator=(const Section&) = delete;

    // From here on only unmaps of these ranges wait.
    void begin_copy(IovaRange range) { begin_copy(range, range); }
    void begin_copy(IovaRange from, IovaRange to) {
      slot_->first[0].store(from.start().value(), std::memory_order_relaxed);
      slot_->last[0].store(from.last().value(), std::memory_order_relaxed);
      slot_->first[1].store(to.start().value(), std::memory_order_relaxed);
      slot_->last[1].store(to.last().value(), std::memory_order_relaxed);
      slot_->state.store(kCopying, std::memory_order_release);
    }

   private:
    Slot* slot_;
  };

  // Waits until no section uses a translation of the range that was true before the range was
  // marked as going. False when the deadline has passed before.
  bool wait_until_unused(IovaRange range, Deadline deadline) const;
  // Waits until no section that is open now is looking at translations.
  void wait_for_lookups() const;

 private:
  static constexpr size_t kSlots = 64;

  Slot* Claim();
  std::span<const Slot> UsedSlots() const {
    return std::span(slots_).first(used_.load(std::memory_order_seq_cst));
  }
  static bool Uses(const Slot& slot, IovaRange range);

  std::array<Slot, kSlots> slots_;
  std::atomic<size_t> used_{0};  // slots from here on were never taken
};

}  // namespace mvgpu::domain
