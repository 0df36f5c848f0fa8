#include "apionly-domain/pin/pinned_range.h"

#include <utility>

#include "apionly-domain/base/check.h"
#include "apionly-domain/pin/pin_context.h"

namespace mvgpu::domain {

PinnedRange& PinnedRange::operator=(PinnedRange&& other) noexcept {
  if (this == &other) return *this;
  reset();
  context_ = other.context_;
  for_write_ = other.for_write_;
  form_ = other.form_;
  runs_ = std::exchange(other.runs_, {});
  return *this;
}

PinnedRange PinnedRange::split_off(Iova at) {
  MVGPU_CHECK(at.is_page_aligned());
  PinnedRange tail(context_, for_write_, form_);
  PinnedRuns head;
  for (const PinnedRun& run : runs()) {
    if (run.iova.last() < at) {
      head.push_back(run);
    } else if (run.iova.start() >= at) {
      tail.runs_.push_back(run);
    } else {
      const Iova before(at.value() - 1);
      head.push_back(run.slice(IovaRange::FromFirstAndLast(run.iova.start(), before)));
      tail.runs_.push_back(run.slice(IovaRange::FromFirstAndLast(at, run.iova.last())));
    }
  }
  runs_ = std::move(head);
  return tail;
}

void PinnedRange::Release() {
  for (const PinnedRun& run : runs()) context_->ReleaseRun(run.iova_pages(), for_write_, form_);
}

PinCounts::Form PinnedRange::keep() {
  runs_.clear();
  return form_;
}

}  // namespace mvgpu::domain
