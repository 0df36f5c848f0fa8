#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string_view>
#include <utility>

#include "apionly-domain/base/check.h"
#include "apionly-domain/pin/pin_backend.h"

namespace mvgpu::testing {

// Counts pins per page and can be told to fail at the n-th call. The state outlives the back end,
// so that a test can look at it after the domain has gone.
class FakePinBackend final : public domain::PinBackend {
 public:
  struct State {
    std::map<std::pair<uint64_t, uint64_t>, int> pages;  // (inode, page) -> pins, never 0
    uint64_t calls = 0;
    uint64_t fail_at_call = 0;  // 1 = the next one; 0 = never
    std::function<void()> on_unpin;
  };
  explicit FakePinBackend(std::shared_ptr<State> state) : state_(std::move(state)) {}

  std::string_view name() const override { return "fake"; }
  Result<void> pin(const domain::GuestFile& file, PageRun run) override {
    ++state_->calls;
    if (state_->fail_at_call != 0 && --state_->fail_at_call == 0) {
      return Fail(ErrorCode::kLimit, "fake pin failure");
    }
    for (uint64_t page = run.first; page < run.end(); ++page) {
      ++state_->pages[{file.identity().inode, page}];
    }
    return {};
  }
  void unpin(const domain::GuestFile& file, PageRun run) override {
    if (state_->on_unpin) state_->on_unpin();
    for (uint64_t page = run.first; page < run.end(); ++page) {
      const auto it = state_->pages.find({file.identity().inode, page});
      MVGPU_CHECK(it != state_->pages.end());
      if (--it->second == 0) state_->pages.erase(it);
    }
  }
  uint64_t locked_pages() const override { return state_->pages.size(); }
  uint32_t granule_pages(const domain::GuestFile&) const override { return 1; }

 private:
  std::shared_ptr<State> state_;
};

}  // namespace mvgpu::testing
