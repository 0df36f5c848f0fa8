#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include <absl/container/inlined_vector.h>

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

// Most pins are one run: those need no memory of their own.
using PinnedRuns = absl::InlinedVector<PinnedRun, 1>;

// A hold on guest pages: while it lives, the pages stay pinned and charged, and their mappings
// stay. Move-only; the destructor releases. Belongs to the context that pinned: nobody else can
// release it. Not thread-safe itself; different ranges may be used by different threads.
class PinnedRange {
 public:
  PinnedRange() = default;
  PinnedRange(PinnedRange&& other) noexcept;
  PinnedRange& operator=(PinnedRange&& other) noexcept;
  PinnedRange(const PinnedRange&) = delete;
  PinnedRange& operator=(const PinnedRange&) = delete;
  ~PinnedRange() { reset(); }

  // In ascending IOVA order, page-aligned; neighbours differ in backing.
  std::span<const PinnedRun> runs() const { return runs_; }
  bool empty() const { return runs_.empty(); }

  // Takes the part from `at` on out of this range. REQUIRES: `at` is page-aligned.
  PinnedRange split_off(Iova at);
  // Releases everything.
  void reset();

 private:
  friend class PinContext;
  PinnedRange(PinContext* context, bool for_write, PinCounts::Form form, PinnedRuns runs)
      : context_(context), for_write_(for_write), form_(form), runs_(std::move(runs)) {}

  PinContext* context_ = nullptr;  // outlives all pins: checked in its destructor
  bool for_write_ = false;
  PinCounts::Form form_ = PinCounts::Form::kDense;  // how the context counts these pages
  PinnedRuns runs_;
};

}  // namespace mvgpu::domain
