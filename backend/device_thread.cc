#include "backend/device_thread.h"

#include <algorithm>
#include <bit>
#include <utility>

namespace mvgpu::backend {

DeviceThread::DeviceThread(std::function<bool(uint16_t)> step, Chore chore)
    : step_(std::move(step)), chore_(std::move(chore)), thread_([this] { Run(); }) {}

void DeviceThread::kick(uint16_t queue) {
  {
    MutexLock lock(mutex_);
    kicked_ |= uint64_t{1} << (queue & 63);
  }
  wake_.notify_one();
}

void DeviceThread::post(std::function<void()> job) {
  {
    MutexLock lock(mutex_);
    jobs_.push_back(std::move(job));
  }
  wake_.notify_one();
}

void DeviceThread::stop() {
  {
    MutexLock lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_one();
  if (thread_.joinable()) thread_.join();
}

void DeviceThread::WaitLocked() {
  if (!due_) {
    wake_.wait(mutex_);
  } else {
    wake_.wait_until(mutex_, *due_);
  }
}

void DeviceThread::RunChore() {
  const auto begin = Clock::now();
  if (begin < *due_) return;
  due_.reset();
  if (!chore_.run()) return;
  const auto end = Clock::now();
  due_ = end + std::max<Clock::duration>(chore_.period, (end - begin) * kChoreShare);
}

void DeviceThread::Run() {
  uint64_t busy = 0;  // queues that may have more
  while (true) {
    std::vector<std::function<void()>> jobs;
    bool stopping = false;
    {
      MutexLock lock(mutex_);
      while (busy == 0 && kicked_ == 0 && jobs_.empty() && !stopping_ &&
             !(due_ && *due_ <= Clock::now())) {
        WaitLocked();
      }
      busy |= std::exchange(kicked_, 0);
      jobs.swap(jobs_);
      stopping = stopping_;
    }
    for (const auto& job : jobs) job();
    if (stopping) return;
    if (busy != 0 && chore_.run && !due_) due_ = Clock::now() + chore_.period;
    for (uint64_t queues = busy; queues != 0; queues &= queues - 1) {
      const int queue = std::countr_zero(queues);
      if (!step_(static_cast<uint16_t>(queue))) busy &= ~(uint64_t{1} << queue);
    }
    if (due_) RunChore();
  }
}

}  // namespace mvgpu::backend
