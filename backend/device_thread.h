#pragma once

#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#include "apionly-domain/base/mutex.h"

namespace mvgpu::backend {

// The thread on which a vGPU works: it serves the queues whose doorbells rang, one request at a
// time and the queues in turn, and runs jobs in between. It sleeps when there is nothing.
// Thread-safe.
class DeviceThread {
 public:
  // `step(queue)` serves one request; false when there was none. Queues are numbered below 64.
  explicit DeviceThread(std::function<bool(uint16_t)> step);
  ~DeviceThread() { stop(); }

  // The queue has work. Never waits.
  void kick(uint16_t queue);
  // Runs `job` on the thread, after the request under way.
  void post(std::function<void()> job);
  // Finishes the request under way and the jobs, and ends the thread. Requests that wait stay where
  // they are.
  void stop();

 private:
  void Run();

  const std::function<bool(uint16_t)> step_;
  Mutex mutex_;
  ConditionVariable wake_;
  uint64_t kicked_ ABSL_GUARDED_BY(mutex_) = 0;  // a bit per queue
  std::vector<std::function<void()>> jobs_ ABSL_GUARDED_BY(mutex_);
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;  // last: it uses the others
};

}  // namespace mvgpu::backend
