#pragma once

#include <absl/base/thread_annotations.h>
#include <atomic>
#include <thread>

namespace mvgpu {

// A lock for a few dozen instructions: one exchange to take it, one plain store to let go, which is
// a third of what a pthread mutex costs (tests/bench, pin + release in batches of 1). Never held
// over a system call or a copy of guest memory. A waiter gives its processor away soon, so that a
// preempted holder comes to run.
class ABSL_LOCKABLE SpinLock {
 public:
  void lock() ABSL_EXCLUSIVE_LOCK_FUNCTION() {
    while (held_.exchange(true, std::memory_order_acquire)) WaitUntilFree();
  }
  // Never waits. For paths that are to call nothing, so that the compiler can do without a frame.
  bool try_lock() ABSL_EXCLUSIVE_TRYLOCK_FUNCTION(true) {
    return !held_.exchange(true, std::memory_order_acquire);
  }
  void unlock() ABSL_UNLOCK_FUNCTION() { held_.store(false, std::memory_order_release); }

 private:
  static constexpr int kSpinsBeforeYield = 100;

  void WaitUntilFree() const {
    for (int spins = 0; held_.load(std::memory_order_relaxed); ++spins) {
      if (spins >= kSpinsBeforeYield) std::this_thread::yield();
    }
  }

  std::atomic<bool> held_{false};
};

class ABSL_SCOPED_LOCKABLE SpinLockHold {
 public:
  explicit SpinLockHold(SpinLock& lock) ABSL_EXCLUSIVE_LOCK_FUNCTION(lock) : lock_(lock) {
    lock_.lock();
  }
  ~SpinLockHold() ABSL_UNLOCK_FUNCTION() { lock_.unlock(); }
  SpinLockHold(const SpinLockHold&) = delete;
  SpinLockHold& operator=(const SpinLockHold&) = delete;

 private:
  SpinLock& lock_;
};

}  // namespace mvgpu
