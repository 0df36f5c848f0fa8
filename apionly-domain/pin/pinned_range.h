#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "apionly-domain/base/address.h"
#include "apionly-domain/pin/pin_counts.h"

namespace mvgpu::domain {

class PinContext;

// Contiguous IOVAs that are contiguous in host memory. Whole pages. ApiOnlyDomain::backing_of()
// says which pages of which file they are.
struct PinnedRun {
  IovaRange iova;
  std::byte* host;  // of the first IOVA; not to be dereferenced, see GuestFile

  PageRun iova_pages() const { return PagesOf(iova); }
  // The part of this run in `part`. REQUIRES: iova.contains(part).
  PinnedRun slice(IovaRange part) const { return {part, host + (part.start() - iova.start())}; }
  bool operator==(const PinnedRun&) const = default;
};

// The runs of one pin, or of another thing that consists of one run as a rule: that needs no memory
// of its own.
template <typename Run>
class RunList {
 public:
  void push_back(const Run& run) {
    if (!one_ && many_ == nullptr) {
      one_ = run;
      return;
    }
    if (many_ == nullptr) many_ = std::make_unique<std::vector<Run>>(1, *std::exchange(one_, {}));
    many_->push_back(run);
  }
  // The same for the first run. REQUIRES: empty().
  void set_one(const Run& run) { one_.emplace(run); }
  std::span<const Run> span() const {
    if (one_) return {&*one_, 1};
    return many_ == nullptr ? std::span<const Run>() : std::span<const Run>(*many_);
  }
  bool empty() const { return !one_ && many_ == nullptr; }
  void clear() {
    one_.reset();
    many_.reset();
  }

 private:
  std::optional<Run> one_;
  std::unique_ptr<std::vector<Run>> many_;  // two at least; null when one_ is set
};
using PinnedRuns = RunList<PinnedRun>;

// A hold on guest pages: while it lives, the pages stay pinned and charged, and their mappings
// stay. Move-only; the destructor releases. Belongs to the context that pinned: nobody else can
// release it. Not thread-safe itself; different ranges may be used by different threads.
class PinnedRange {
 public:
  PinnedRange() = default;
  PinnedRange(PinnedRange&& other) noexcept
      : context_(other.context_),
        for_write_(other.for_write_),
        form_(other.form_),
        runs_(std::exchange(other.runs_, {})) {}
  PinnedRange& operator=(PinnedRange&& other) noexcept;
  PinnedRange(const PinnedRange&) = delete;
  PinnedRange& operator=(const PinnedRange&) = delete;
  ~PinnedRange() {
    if (!runs_.empty()) Release();
  }

  // In ascending IOVA order, page-aligned; neighbours do not continue each other in host memory.
  std::span<const PinnedRun> runs() const { return runs_.span(); }
  bool empty() const { return runs_.empty(); }

  // Takes the part from `at` on out of this range. REQUIRES: `at` is page-aligned.
  PinnedRange split_off(Iova at);
  // Releases everything.
  void reset() {
    if (!runs_.empty()) Release();
    runs_.clear();
  }
  // Gives the handle up and not the pin: PinContext::release_kept() lets go of it, as a whole or in
  // any parts. Returns how the context counts the pages. For who has many pins, and books of its
  // own.
  PinCounts::Form keep();

 private:
  friend class PinContext;
  PinnedRange(PinContext* context, bool for_write, PinCounts::Form form)
      : context_(context), for_write_(for_write), form_(form) {}
  // Leaves the runs where they are.
  void Release();

  PinContext* context_ = nullptr;  // outlives all pins: checked in its destructor
  bool for_write_ = false;
  PinCounts::Form form_ = PinCounts::Form::kDense;  // how the context counts these pages
  PinnedRuns runs_;
};

}  // namespace mvgpu::domain
