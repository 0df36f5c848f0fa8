#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "apionly-domain/base/mutex.h"

namespace mvgpu::backend {

// The thread on which a vGPU works: it serves the queues whose doorbells rang, one request at a
// time and the queues in turn, and runs jobs in between. It sleeps when there is nothing.
// Thread-safe.
class DeviceThread {
 public:
  // What is to be done again and again while there is something to do it for.
  struct Chore {
    // False: there is nothing, and there will be nothing before the next step. Null: no chore.
    std::function<bool()> run;
    std::chrono::nanoseconds period{};  // from its end to its next start; longer when it takes long
  };
  // Of its own time, a chore gets at most one part in so many.
  static constexpr int kChoreShare = 50;

  // `step(queue)` serves one request; false when there was none. Queues are numbered below 64.
  explicit DeviceThread(std::function<bool(uint16_t)> step) : DeviceThread(std::move(step), {}) {}
  DeviceThread(std::function<bool(uint16_t)> step, Chore chore);
  ~DeviceThread() { stop(); }

  // The queue has work. Never waits.
  void kick(uint16_t queue);
  // Runs `job` on the thread, after the request under way.
  void post(std::function<void()> job);
  // Finishes the request under way and the jobs, and ends the thread. Requests that wait stay where
  // they are.
  void stop();

 private:
  using Clock = std::chrono::steady_clock;

  void Run();
  // Until there is work, or the chore is due.
  void WaitLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void RunChore();

  const std::function<bool(uint16_t)> step_;
  const Chore chore_;
  std::optional<Clock::time_point> due_;  // of the chore; used by the thread alone
  Mutex mutex_;
  ConditionVariable wake_;
  uint64_t kicked_ ABSL_GUARDED_BY(mutex_) = 0;  // a bit per queue
  std::vector<std::function<void()>> jobs_ ABSL_GUARDED_BY(mutex_);
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;  // last: it uses the others
};

}  // namespace mvgpu::backend
