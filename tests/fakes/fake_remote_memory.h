#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstddef>
#include <mutex>
#include <span>
#include <vector>

#include "apionly-domain/api_only_domain.h"

namespace mvgpu::testing {

// The VMM as it answers for memory without a file: bytes of its own, from one IOVA on. Can be told
// to refuse, or to let whoever asks wait. Thread-safe.
class FakeRemoteMemory final : public domain::RemoteMemory {
 public:
  FakeRemoteMemory(Iova start, size_t size) : start_(start), bytes_(size) {}

  Result<void> read(Iova iova, std::span<std::byte> destination) override {
    std::unique_lock lock(mutex_);
    if (auto allowed = Enter(lock); !allowed) return allowed;
    std::copy_n(bytes_.begin() + Index(iova), destination.size(), destination.begin());
    return {};
  }
  Result<void> write(Iova iova, std::span<const std::byte> source) override {
    std::unique_lock lock(mutex_);
    if (auto allowed = Enter(lock); !allowed) return allowed;
    std::copy(source.begin(), source.end(), bytes_.begin() + Index(iova));
    return {};
  }

  // REQUIRES, for these: nobody reads or writes at the same time.
  std::span<std::byte> bytes() { return bytes_; }
  int calls() const { return calls_; }
  void refuse_from_call(int call) { refuse_from_call_ = call; }  // 1 = the next one
  void pending_for(int calls) { pending_until_call_ = calls_ + calls; }

  void stall() {
    std::lock_guard lock(mutex_);
    stalls_ = true;
  }
  void wait_until_somebody_waits() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return waiting_; });
  }
  void go_on() {
    std::lock_guard lock(mutex_);
    stalls_ = false;
    changed_.notify_all();
  }

 private:
  Result<void> Enter(std::unique_lock<std::mutex>& lock) {
    ++calls_;
    if (stalls_) {
      waiting_ = true;
      changed_.notify_all();
      changed_.wait(lock, [this] { return !stalls_; });
      waiting_ = false;
    }
    if (refuse_from_call_ != 0 && calls_ >= refuse_from_call_) {
      return Fail(ErrorCode::kNotReachable, "the vmm refuses");
    }
    if (calls_ <= pending_until_call_) return Fail(ErrorCode::kPending, "on its way");
    return {};
  }
  std::ptrdiff_t Index(Iova iova) const { return static_cast<std::ptrdiff_t>(iova - start_); }

  const Iova start_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::byte> bytes_;
  int calls_ = 0;
  int refuse_from_call_ = 0;
  int pending_until_call_ = 0;
  bool stalls_ = false;
  bool waiting_ = false;
};

}  // namespace mvgpu::testing
