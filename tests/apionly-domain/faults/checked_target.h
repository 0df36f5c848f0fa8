#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <set>

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/assigned/device_target.h"

namespace mvgpu::testing {

// A device's pages, by number. Sees to it that nothing is mapped over, that only what is mapped is
// unmapped, that what the device reaches is pinned, and that it stays pinned until the flush after
// it was unmapped. Thread-safe.
class CheckedTarget final : public domain::DeviceTarget {
 public:
  struct Page {
    std::byte* host;
    domain::Access access;
    bool operator==(const Page&) const = default;
  };

  explicit CheckedTarget(const domain::ApiOnlyDomain* guest) : guest_(*guest) {}
  ~CheckedTarget() override { EXPECT_TRUE(pages_.empty() && unflushed_.empty()); }

  Result<void> map(IovaRange iova, std::byte* host, domain::Access access) override {
    if (during_map) during_map(iova);
    std::lock_guard lock(mutex_);
    ++map_calls;
    if (fails_at && iova.contains(Iova(BytesIn(*fails_at)))) {
      return Fail(ErrorCode::kSystem, "the target does not map this");
    }
    ExpectPinned(iova);
    const PageRun run = PagesOf(iova);
    for (uint64_t i = 0; i < run.count; ++i) {
      EXPECT_FALSE(unflushed_.contains(run.first + i)) << "mapped again before the flush";
      EXPECT_TRUE(pages_.try_emplace(run.first + i, Page{host + BytesIn(i), access}).second)
          << "mapped over: page " << run.first + i;
    }
    return {};
  }
  void unmap(IovaRange iova) override {
    if (during_unmap) during_unmap(iova);
    std::lock_guard lock(mutex_);
    ++unmap_calls;
    const PageRun run = PagesOf(iova);
    for (uint64_t page = run.first; page < run.end(); ++page) {
      EXPECT_EQ(pages_.erase(page), 1u) << "not mapped: page " << page;
      unflushed_.insert(page);
      lost.erase(page);
    }
  }
  void flush() override {
    std::lock_guard lock(mutex_);
    ++flushes;
    if (checks_pins) {
      for (const uint64_t page : unflushed_) ExpectPinned(RangeOf({page, 1}));
    }
    unflushed_.clear();
  }
  bool shows(IovaRange iova, const std::byte* host) const override {
    std::lock_guard lock(mutex_);
    const auto found = pages_.find(iova.start().page());
    return found != pages_.end() && found->second.host == host && !lost.contains(found->first);
  }
  bool take_accessed(Iova page) override {
    std::lock_guard lock(mutex_);
    return accessed.erase(page.page()) != 0 || always_accessed;
  }

  std::map<uint64_t, Page> pages() const {
    std::lock_guard lock(mutex_);
    return pages_;
  }
  std::set<uint64_t> page_numbers() const {
    std::set<uint64_t> numbers;
    for (const auto& [page, shown] : pages()) numbers.insert(page);
    return numbers;
  }

  std::function<void(IovaRange)> during_map;  // without the target's lock
  std::function<void(IovaRange)> during_unmap;
  std::optional<uint64_t> fails_at;  // page
  std::set<uint64_t> lost;           // pages that the IOMMU has forgotten
  std::set<uint64_t> accessed;
  bool always_accessed = false;
  bool checks_pins = true;  // with several threads a flush is of everybody's pages
  uint64_t map_calls = 0;
  uint64_t unmap_calls = 0;
  uint64_t flushes = 0;

 private:
  void ExpectPinned(IovaRange range) const {
    uint64_t pinned = 0;
    for (const auto& holder : guest_.holders(range)) pinned += holder.pages;
    EXPECT_GE(pinned, PagesIn(range.size())) << "not pinned: " << std::hex << range.start().value();
  }

  const domain::ApiOnlyDomain& guest_;
  mutable std::mutex mutex_;
  std::map<uint64_t, Page> pages_;
  std::set<uint64_t> unflushed_;
};

}  // namespace mvgpu::testing
