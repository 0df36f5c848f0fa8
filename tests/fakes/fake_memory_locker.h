#pragma once

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <memory>
#include <set>

#include "apionly-domain/base/address.h"
#include "apionly-domain/pin/memory_locker.h"

namespace mvgpu::testing {

// A kernel that remembers which pages are locked and can be told to fail. The state outlives the
// locker.
class FakeMemoryLocker final : public domain::MemoryLocker {
 public:
  struct State {
    std::set<uint64_t> locked;  // page numbers of addresses
    std::set<uint64_t> present;
    uint64_t calls = 0;
    uint64_t fail_at_call = 0;  // 1 = the next one; 0 = never
    int failure = ENOMEM;
    uint64_t max_locked = UINT64_MAX;  // pages, as RLIMIT_MEMLOCK
    bool refuses_unlock = false;

    bool is_held(const std::byte* address) const {
      const uint64_t page = reinterpret_cast<uintptr_t>(address) / kPageSize;
      return locked.contains(page) && present.contains(page);
    }
    // Stretches of locked pages: what the kernel has memory areas for.
    uint64_t stretches() const {
      return static_cast<uint64_t>(std::count_if(
          locked.begin(), locked.end(), [this](uint64_t p) { return !locked.contains(p - 1); }));
    }
  };
  explicit FakeMemoryLocker(std::shared_ptr<State> state) : state_(std::move(state)) {}

  int lock(const std::byte* address, uint64_t size) override {
    const int error = lock_on_fault(address, size);
    return error != 0 ? error : BringIn(address, size);
  }
  int lock_on_fault(const std::byte* address, uint64_t size) override {
    if (Fails()) return state_->failure;
    std::set<uint64_t> locked = state_->locked;
    for (const uint64_t page : Pages(address, size)) locked.insert(page);
    if (locked.size() > state_->max_locked) return ENOMEM;
    state_->locked = std::move(locked);
    return 0;
  }
  int bring_in(std::byte* address, uint64_t size) override {
    return Fails() ? state_->failure : BringIn(address, size);
  }
  int unlock(const std::byte* address, uint64_t size) override {
    if (state_->refuses_unlock || Fails()) return state_->failure;
    for (const uint64_t page : Pages(address, size)) {
      state_->locked.erase(page);
      state_->present.erase(page);
    }
    return 0;
  }

 private:
  static std::set<uint64_t> Pages(const std::byte* address, uint64_t size) {
    std::set<uint64_t> pages;
    const uint64_t first = reinterpret_cast<uintptr_t>(address) / kPageSize;
    for (uint64_t i = 0; i < PagesIn(size); ++i) pages.insert(first + i);
    return pages;
  }
  int BringIn(const std::byte* address, uint64_t size) {
    state_->present.merge(Pages(address, size));
    return 0;
  }
  bool Fails() {
    ++state_->calls;
    return state_->fail_at_call != 0 && --state_->fail_at_call == 0;
  }

  std::shared_ptr<State> state_;
};

}  // namespace mvgpu::testing
