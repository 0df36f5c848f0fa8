#include "apionly-domain/translation/access_slots.h"

#include <thread>

namespace mvgpu::domain {

namespace {

// 0, 1, 2 ... in the order in which threads come here.
size_t ThreadNumber() {
  static std::atomic<size_t> next{0};
  constinit thread_local size_t after = 0;  // none yet; constinit: needs no guard
  if (after == 0) [[unlikely]] {
    after = next.fetch_add(1, std::memory_order_relaxed) + 1;
  }
  return after - 1;
}

// Soon without a system call, then by giving the processor away, then asleep.
void Pause(unsigned round) {
  if (round < 64) return;
  if (round < 256) {
    std::this_thread::yield();
  } else {
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
}

}  // namespace

AccessSlots::Slot* AccessSlots::Claim() {
  const size_t favourite = ThreadNumber();
  for (unsigned round = 0;; ++round) {
    const size_t index = (favourite + round) % kSlots;
    Slot& slot = slots_[index];
    uint32_t state = kFree;
    // seq_cst: the lookups that follow see every range that was marked as going before somebody
    // found this slot free (the other half is in wait_until_unused()).
    if (slot.state.compare_exchange_strong(state, kTranslating, std::memory_order_seq_cst)) {
      size_t used = used_.load(std::memory_order_relaxed);
      while (used <= index && !used_.compare_exchange_weak(used, index + 1)) {
      }
      return &slot;
    }
    if (round >= kSlots) Pause(round);
  }
}

bool AccessSlots::Uses(const Slot& slot, IovaRange range) {
  // seq_cst: the other half of Claim().
  const uint32_t state = slot.state.load(std::memory_order_seq_cst);
  if (state != kCopying) return state == kTranslating;
  for (size_t i = 0; i < slot.first.size(); ++i) {
    // The slot may be taken again while this reads: then it says too much or too little about the
    // new section, which has seen that the range is going.
    const uint64_t first = slot.first[i].load(std::memory_order_relaxed);
    const uint64_t last = slot.last[i].load(std::memory_order_relaxed);
    if (first <= range.last().value() && range.start().value() <= last) return true;
  }
  return false;
}

bool AccessSlots::wait_until_unused(IovaRange range, Deadline deadline) const {
  for (const Slot& slot : UsedSlots()) {
    for (unsigned round = 0; Uses(slot, range); ++round) {
      if (round >= 64 && std::chrono::steady_clock::now() >= deadline) return false;
      Pause(round);
    }
  }
  return true;
}

void AccessSlots::wait_for_lookups() const {
  for (const Slot& slot : UsedSlots()) {
    for (unsigned round = 0; slot.state.load(std::memory_order_seq_cst) == kTranslating; ++round) {
      Pause(round);
    }
  }
}

}  // namespace mvgpu::domain
