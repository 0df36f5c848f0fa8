#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <vector>

#include "apionly-domain/base/error.h"

namespace mvgpu::dma::testing {

// What a cache must do for pages [0, kPages) and kUsers users, page by page: who holds what, what
// is idle in which order, what is pinned.
template <uint64_t kPages, size_t kUsers>
class CacheReference {
 public:
  static constexpr uint64_t kUnmapped = UINT64_MAX;
  struct Page {
    uint64_t file_page = kUnmapped;
    std::array<std::array<uint32_t, 2>, kUsers> holds{};  // by user, for writing
    uint64_t idle = 0;                                    // the larger, the later; 0: not idle
    uint32_t all(bool for_write) const {
      uint32_t sum = 0;
      for (const auto& of_user : holds) sum += of_user[for_write ? 1 : 0];
      return sum;
    }
    bool is_held() const { return all(false) + all(true) != 0; }
    bool is_cached() const { return is_held() || idle != 0; }
  };

  CacheReference(uint64_t idle_limit, uint64_t pin_limit)
      : idle_limit_(idle_limit), pin_limit_(pin_limit) {}

  const Page& at(uint64_t page) const { return pages_[page]; }
  size_t idle_pages() const { return idle_.size(); }
  size_t pinned_pages() const { return pinned_.size(); }
  uint64_t miss_pages() const { return miss_pages_; }
  uint64_t evicted_pages() const { return evicted_pages_; }

  void set_file_page(uint64_t page, uint64_t file_page) { pages_[page].file_page = file_page; }

  // What a request needs that its user does not hold for this: all at once, or an error. Pages in
  // ascending order, each once.
  std::optional<ErrorCode> try_make_cached(const std::vector<uint64_t>& wanted) {
    std::vector<uint64_t> were_idle;
    std::vector<uint64_t> gaps;
    for (const uint64_t page : wanted) {
      if (pages_[page].idle != 0) {
        were_idle.push_back(page);
        RemoveFromIdle(page);
      } else if (!pages_[page].is_held()) {
        gaps.push_back(page);
      }
    }
    // They are no longer in the list, so that they do not go for the gaps; their pins stay.
    auto failed = Pin(gaps);
    if (failed) {
      for (const uint64_t page : were_idle) AddIdle(page);
      return failed;
    }
    miss_pages_ += gaps.size();
    return std::nullopt;
  }
  void hold(size_t user, uint64_t page, bool for_write) {
    ++pages_[page].holds[user][for_write ? 1 : 0];
  }
  // In the order in which they are given back.
  void release(size_t user, const std::vector<uint64_t>& pages, bool for_write) {
    for (const uint64_t page : pages) {
      --pages_[page].holds[user][for_write ? 1 : 0];
      if (pages_[page].is_held()) continue;
      if (idle_limit_ == 0) {
        Unpin(page);
      } else {
        AddIdle(page);
      }
    }
    while (idle_.size() > idle_limit_) EvictOldest();
  }
  // Pages that were cached for a request that failed after that.
  void drop(uint64_t page) { Unpin(page); }
  void take_idle_again(const std::vector<uint64_t>& pages) {
    for (const uint64_t page : pages) AddIdle(page);
  }
  void revoke(uint64_t page) {
    if (!pages_[page].is_cached()) return;
    if (pages_[page].idle != 0) RemoveFromIdle(page);
    pages_[page].holds = {};
    Unpin(page);
  }

 private:
  std::optional<ErrorCode> Pin(const std::vector<uint64_t>& gaps) {
    if (std::any_of(gaps.begin(), gaps.end(),
                    [this](uint64_t page) { return pages_[page].file_page == kUnmapped; })) {
      return ErrorCode::kNotMapped;
    }
    for (;;) {
      std::set<uint64_t> fresh;
      for (const uint64_t page : gaps) {
        if (!pinned_.contains(pages_[page].file_page)) fresh.insert(pages_[page].file_page);
      }
      if (pinned_.size() + fresh.size() <= pin_limit_) break;
      if (idle_.empty()) return ErrorCode::kLimit;
      for (size_t i = 0; i < gaps.size() && !idle_.empty(); ++i) EvictOldest();
    }
    for (const uint64_t page : gaps) ++pinned_[pages_[page].file_page];
    return std::nullopt;
  }
  void Unpin(uint64_t page) {
    const auto it = pinned_.find(pages_[page].file_page);
    if (--it->second == 0) pinned_.erase(it);
  }
  void AddIdle(uint64_t page) {
    pages_[page].idle = ++age_;
    idle_.emplace(age_, page);
  }
  void RemoveFromIdle(uint64_t page) {
    idle_.erase(pages_[page].idle);
    pages_[page].idle = 0;
  }
  void EvictOldest() {
    const uint64_t page = idle_.begin()->second;
    RemoveFromIdle(page);
    Unpin(page);
    ++evicted_pages_;
  }

  const uint64_t idle_limit_;
  const uint64_t pin_limit_;
  std::array<Page, kPages> pages_{};
  std::map<uint64_t, uint64_t> idle_;    // age -> page
  std::map<uint64_t, uint32_t> pinned_;  // file page -> cached pages that show it
  uint64_t age_ = 0;
  uint64_t miss_pages_ = 0;
  uint64_t evicted_pages_ = 0;
};

}  // namespace mvgpu::dma::testing
