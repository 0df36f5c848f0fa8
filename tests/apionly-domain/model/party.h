#pragma once

// For the model check with threads: an owner with a context that several threads may use, and what
// it holds.

#include <atomic>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/base/mutex.h"
#include "tests/fakes/guest_ram.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::domain::model {

// When an owner lets go of what it is asked for.
enum class Manner : uint8_t {
  kAtOnce,     // in the callback
  kLate,       // later, from one of the threads that use the context
  kSometimes,  // every second time, in the callback
};

// One pin: a handle, or single pages without one.
struct Hold {
  PinnedRange handle;
  std::vector<Iova> pages;
  Access access = Access::kRead;
  IovaRange where = testing::MakeRange(0, kPageSize);  // all that it touches
  std::byte value = {};  // what the pages show: one value for each file
};

// Thread-safe. Lock order: this one's lock, then the domain's.
class Party final : public PinOwner {
 public:
  Party(ApiOnlyDomain* domain, std::string name, Manner manner)
      : domain_(*domain), name_(std::move(name)), manner_(manner) {
    context_ = domain_.open_context(this);
  }
  ~Party() override { ReleaseAll(); }

  std::string_view pin_owner_name() const override { return name_; }
  void on_revoke(IovaRange range) override {
    MutexLock lock(mutex_);
    ++revocations_;
    if (manner_ == Manner::kAtOnce || (manner_ == Manner::kSometimes && revocations_ % 2 == 0)) {
      ReleaseInLocked(range);
    } else if (manner_ == Manner::kLate) {
      asked_for_.push_back(range);
    }
  }

  PinContext& context() { return *context_; }
  // Read before a pin, and handed to Keep() with it.
  uint64_t revocations() const { return revocations_.load(std::memory_order_acquire); }
  // Keeps the hold, unless somebody was told to let go since: then it may be in the way.
  void Keep(Hold hold, uint64_t revocations_before) {
    MutexLock lock(mutex_);
    holds_.push_back(std::move(hold));
    if (revocations() != revocations_before) ReleaseLocked(holds_.size() - 1);
  }
  // look(const Hold&), which stays as long as that takes.
  template <typename Look>
  void LookAtOne(uint64_t random, const Look& look) {
    MutexLock lock(mutex_);
    if (!holds_.empty()) look(holds_[random % holds_.size()]);
  }
  void ReleaseOne(uint64_t random) {
    MutexLock lock(mutex_);
    if (!holds_.empty()) ReleaseLocked(random % holds_.size());
  }
  // Also cuts handles: releases a part and keeps the rest.
  void ReleasePart(uint64_t random) {
    MutexLock lock(mutex_);
    if (holds_.empty()) return;
    Hold& hold = holds_[random % holds_.size()];
    if (hold.handle.empty()) return;
    const uint64_t pages = PagesIn(hold.where.size());
    if (pages < 2) return;
    const Iova at = hold.where.start() + BytesIn(1 + (random >> 8) % (pages - 1));
    hold.handle.split_off(at).reset();
    hold.where = IovaRange::FromFirstAndLast(hold.where.start(), Iova(at.value() - 1));
  }
  // What a late owner was asked for.
  void CatchUp() {
    MutexLock lock(mutex_);
    for (const IovaRange range : std::exchange(asked_for_, {})) ReleaseInLocked(range);
  }
  void ReleaseAll() {
    MutexLock lock(mutex_);
    while (!holds_.empty()) ReleaseLocked(holds_.size() - 1);
  }
  // Closes the context and opens another. REQUIRES: no other thread uses this party.
  void Reopen() {
    ReleaseAll();
    context_.reset();
    context_ = domain_.open_context(this);
  }

 private:
  void ReleaseInLocked(IovaRange range) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    for (size_t i = holds_.size(); i-- > 0;) {
      if (holds_[i].where.overlaps(range)) ReleaseLocked(i);
    }
  }
  void ReleaseLocked(size_t i) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    Hold gone = std::move(holds_[i]);
    if (i + 1 != holds_.size()) holds_[i] = std::move(holds_.back());
    holds_.pop_back();
    EXPECT_THAT(context_->unpin_pages(gone.pages, gone.access), testing::IsOk());
  }

  ApiOnlyDomain& domain_;  // outlives the parties
  const std::string name_;
  const Manner manner_;
  std::unique_ptr<PinContext> context_;
  std::atomic<uint64_t> revocations_{0};
  Mutex mutex_;
  std::vector<Hold> holds_ ABSL_GUARDED_BY(mutex_);
  std::vector<IovaRange> asked_for_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace mvgpu::domain::model
