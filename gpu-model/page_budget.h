#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <utility>

#include "apionly-domain/base/error.h"

namespace mvgpu::gpu {

// How many pages of a device's address space may be kept translated. Not thread-safe.
class PageBudget {
 public:
  explicit PageBudget(uint64_t limit) : limit_(limit) {}
  PageBudget(const PageBudget&) = delete;
  PageBudget& operator=(const PageBudget&) = delete;

  uint64_t used() const { return used_; }

 private:
  friend class PageCharge;
  const uint64_t limit_;
  uint64_t used_ = 0;
};

// Pages of a budget, until it goes. Move-only.
class PageCharge {
 public:
  PageCharge() = default;
  // `budget` outlives the charge. Errors: kLimit.
  static Result<PageCharge> Create(uint64_t pages, PageBudget* budget) {
    if (pages > budget->limit_ - budget->used_) {
      return Fail(ErrorCode::kLimit,
                  fmt::format("{} of {} translated pages are in use, {} more do not fit; detach "
                              "backings, or attach shorter ones",
                              budget->used_, budget->limit_, pages));
    }
    budget->used_ += pages;
    return PageCharge(pages, budget);
  }
  PageCharge(PageCharge&& other) noexcept
      : pages_(std::exchange(other.pages_, 0)), budget_(std::exchange(other.budget_, nullptr)) {}
  PageCharge& operator=(PageCharge&& other) noexcept {
    std::swap(pages_, other.pages_);
    std::swap(budget_, other.budget_);
    return *this;
  }
  PageCharge(const PageCharge&) = delete;
  PageCharge& operator=(const PageCharge&) = delete;
  ~PageCharge() {
    if (budget_ != nullptr) budget_->used_ -= pages_;
  }

 private:
  PageCharge(uint64_t pages, PageBudget* budget) : pages_(pages), budget_(budget) {}

  uint64_t pages_ = 0;
  PageBudget* budget_ = nullptr;  // outlives this: contract of Create()
};

}  // namespace mvgpu::gpu
