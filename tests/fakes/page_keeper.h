#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "apionly-domain/assigned/software_iommu.h"
#include "apionly-domain/pin/pin_backend.h"

namespace mvgpu::testing {

// A kernel's view of guest memory: which pages pin back ends lock, and how many IOMMU mappings hold
// each. It looks at every change, and can be told to refuse the n-th call. Pages are
// those of the one file that it knows. Outlives who uses it; may be called by several threads.
class PageKeeper {
 public:
  using Pages = std::set<uint64_t>;
  // Where containers have mapped the file. REQUIRES: of all that are used, before they are.
  void add_view(std::shared_ptr<domain::GuestFile> file) { views_.push_back(std::move(file)); }
  uint64_t page_at(const std::byte* host) const {
    for (const auto& view : views_) {
      const auto offset = static_cast<uint64_t>(host - view->host_address(0));
      if (offset < view->size()) return PagesIn(offset);
    }
    MVGPU_CHECK(false);
    return 0;
  }

  // `locker` holds these pages, and so they must be locked by it or held by a mapping, at every
  // instant from now on.
  void want(int locker, Pages pages) {
    const std::scoped_lock lock(mutex_);
    wanted_[locker] = std::move(pages);
    for (const uint64_t page : wanted_[locker]) Look(page);
  }
  // Of those that may fail, lock() and map(): refuses this one (1 = the next one; 0 = none), and
  // the `more` behind it.
  void fail_at_call(uint64_t call, uint64_t more = 0) {
    const std::scoped_lock lock(mutex_);
    fail_at_call_ = call;
    fail_more_ = more;
    has_failed_ = false;
  }
  bool has_failed() const { return has_failed_; }
  uint64_t lock_calls() const { return lock_calls_; }
  // The first page that was not kept, or was locked twice; empty when all is well.
  const std::string& problem() const { return problem_; }

  bool is_locked(int locker, uint64_t page) const {
    const auto found = locked_.find(locker);
    return found != locked_.end() && found->second.contains(page);
  }
  uint64_t locked_pages(int locker) const {
    const auto found = locked_.find(locker);
    return found == locked_.end() ? 0 : found->second.size();
  }
  uint64_t mappings_of(uint64_t page) const {
    const auto found = mapped_.find(page);
    return found == mapped_.end() ? 0 : found->second;
  }
  uint64_t mapped_pages() const { return mapped_.size(); }  // each once

  bool lock(int locker, uint64_t first, uint64_t count) {
    const std::scoped_lock hold(mutex_);
    ++lock_calls_;
    if (Fails()) return false;
    for (uint64_t page = first; page < first + count; ++page) {
      if (!locked_[locker].insert(page).second) Complain("is locked twice", page);
    }
    return true;
  }
  void unlock(int locker, uint64_t first, uint64_t count) {
    const std::scoped_lock hold(mutex_);
    for (uint64_t page = first; page < first + count; ++page) {
      if (locked_[locker].erase(page) == 0) Complain("is unlocked without a lock", page);
      Look(page);
    }
  }
  bool map(uint64_t first, uint64_t count) {
    const std::scoped_lock hold(mutex_);
    if (Fails()) return false;
    for (uint64_t page = first; page < first + count; ++page) ++mapped_[page];
    return true;
  }
  void unmap(uint64_t first, uint64_t count) {
    const std::scoped_lock hold(mutex_);
    for (uint64_t page = first; page < first + count; ++page) {
      if (--mapped_[page] == 0) mapped_.erase(page);
      Look(page);
    }
  }

 private:
  bool Fails() {
    if (fail_at_call_ == 0 || --fail_at_call_ != 0) return false;
    has_failed_ = true;
    if (fail_more_ != 0) {
      --fail_more_;
      fail_at_call_ = 1;
    }
    return true;
  }
  void Look(uint64_t page) {
    for (const auto& [locker, pages] : wanted_) {
      if (pages.contains(page) && !is_locked(locker, page) && mappings_of(page) == 0) {
        Complain("is held and neither locked nor mapped", page);
      }
    }
  }
  void Complain(std::string_view what, uint64_t page) {
    if (problem_.empty()) problem_ = fmt::format("page {} {}", page, what);
  }

  std::vector<std::shared_ptr<domain::GuestFile>> views_;
  std::mutex mutex_;
  std::map<int, Pages> wanted_;  // by locker
  std::map<int, Pages> locked_;
  std::map<uint64_t, uint64_t> mapped_;
  uint64_t lock_calls_ = 0;
  uint64_t fail_at_call_ = 0;
  uint64_t fail_more_ = 0;
  bool has_failed_ = false;
  std::string problem_;
};

// A pin back end of that kernel.
class KeepingPinBackend final : public domain::PinBackend {
 public:
  KeepingPinBackend(PageKeeper* keeper, int locker) : keeper_(*keeper), locker_(locker) {}

  std::string_view name() const override { return "fake"; }
  Result<void> pin(const domain::GuestFile& file, PageRun run) override {
    if (!keeper_.lock(locker_, First(file, run), run.count)) {
      return Fail(ErrorCode::kLimit, "fake lock failure");
    }
    locked_pages_ += run.count;
    return {};
  }
  void unpin(const domain::GuestFile& file, PageRun run) override {
    keeper_.unlock(locker_, First(file, run), run.count);
    locked_pages_ -= run.count;
  }
  uint64_t locked_pages() const override { return locked_pages_; }
  uint32_t granule_pages(const domain::GuestFile&) const override { return 1; }

 private:
  uint64_t First(const domain::GuestFile& file, PageRun run) const {
    return keeper_.page_at(file.host_address(BytesIn(run.first)));
  }
  PageKeeper& keeper_;  // outlives this
  const int locker_;
  uint64_t locked_pages_ = 0;
};

// An IOMMU in software of which the kernel holds what is mapped, as of a real one.
class KeepingIommu final : public domain::AssignedIommu {
 public:
  explicit KeepingIommu(PageKeeper* keeper) : keeper_(*keeper) {}

  std::string_view name() const override { return "vfio-type1"; }
  Result<void> map(IovaRange iova, std::byte* host, domain::Access access) override {
    if (!keeper_.map(keeper_.page_at(host), PagesIn(iova.size()))) {
      return Fail(ErrorCode::kLimit, "fake map failure");
    }
    auto mapped = iommu_.map(iova, host, access);
    if (mapped) {
      hosts_[iova.start().value()] = host;
    } else {
      keeper_.unmap(keeper_.page_at(host), PagesIn(iova.size()));
    }
    return mapped;
  }
  Result<void> unmap(IovaRange iova) override {
    MVGPU_RETURN_IF_ERROR(iommu_.unmap(iova));
    const auto host = hosts_.find(iova.start().value());
    keeper_.unmap(keeper_.page_at(host->second), PagesIn(iova.size()));
    hosts_.erase(host);
    return {};
  }
  void flush() override { iommu_.flush(); }
  bool holds_memory() const override { return true; }
  std::span<const IovaRange> usable_ranges() const override { return iommu_.usable_ranges(); }
  uint64_t page_sizes() const override { return iommu_.page_sizes(); }

 private:
  PageKeeper& keeper_;  // outlives this
  domain::SoftwareIommu iommu_;
  std::map<uint64_t, std::byte*> hosts_;  // by first IOVA
};

}  // namespace mvgpu::testing
