#pragma once

// A pin back end that holds every page at most once, and says so when it is asked for more.

#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>

#include <fmt/format.h>

#include "apionly-domain/pin/pin_backend.h"

namespace mvgpu::domain::model {

class StrictBackend final : public PinBackend {
 public:
  // Outlives the back end, so that a test can look at it after the domain has gone.
  struct State {
    std::set<std::pair<uint64_t, uint64_t>> pages;  // inode, page
    uint64_t calls = 0;
    uint64_t fail_at_call = 0;  // 1 = the next one; 0 = never
    bool failed = false;        // since somebody cleared it
    std::string problem;        // the first one: pinned twice, or unpinned without being pinned
  };
  explicit StrictBackend(std::shared_ptr<State> state) : state_(std::move(state)) {}

  std::string_view name() const override { return "strict"; }
  Result<void> pin(const GuestFile& file, PageRun run) override {
    ++state_->calls;
    if (state_->fail_at_call != 0 && --state_->fail_at_call == 0) {
      state_->failed = true;
      return Fail(ErrorCode::kSystem, "fake pin failure");
    }
    auto hint = state_->pages.lower_bound({file.identity().inode, run.first});
    for (uint64_t page = run.first; page < run.end(); ++page) {
      const size_t before = state_->pages.size();
      hint = std::next(state_->pages.insert(hint, {file.identity().inode, page}));
      if (state_->pages.size() == before) Complain("pinned twice", page);
    }
    return {};
  }
  void unpin(const GuestFile& file, PageRun run) override {
    for (uint64_t page = run.first; page < run.end(); ++page) {
      if (state_->pages.erase({file.identity().inode, page}) == 0) {
        Complain("unpinned without being pinned", page);
      }
    }
  }
  uint64_t locked_pages() const override { return state_->pages.size(); }
  uint32_t granule_pages(const GuestFile&) const override { return 1; }

 private:
  void Complain(const char* what, uint64_t page) {
    if (state_->problem.empty()) state_->problem = fmt::format("file page {} is {}", page, what);
  }
  std::shared_ptr<State> state_;
};

}  // namespace mvgpu::domain::model
