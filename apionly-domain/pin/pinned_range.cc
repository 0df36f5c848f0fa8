#include "apionly-domain/pin/pinned_range.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "apionly-domain/base/check.h"
#include "apionly-domain/pin/pin_context.h"

namespace mvgpu::domain {

PinnedRange::PinnedRange(PinnedRange&& other) noexcept { *this = std::move(other); }

PinnedRange& PinnedRange::operator=(PinnedRange&& other) noexcept {
  if (this == &other) return *this;
  reset();
  context_ = other.context_;
  for_write_ = other.for_write_;
  form_ = other.form_;
  runs_.assign(other.runs_.begin(), other.runs_.end());
  other.runs_.clear();
  return *this;
}

PinnedRange PinnedRange::split_off(Iova at) {
  MVGPU_CHECK(at.is_page_aligned());
  auto first = std::find_if(runs_.begin(), runs_.end(),
                            [at](const PinnedRun& run) { return run.iova.last() >= at; });
  PinnedRuns tail;
  if (first != runs_.end() && first->iova.start() < at) {
    tail.push_back(first->slice(IovaRange::FromFirstAndLast(at, first->iova.last())));
    *first = first->slice(IovaRange::FromFirstAndLast(first->iova.start(), Iova(at.value() - 1)));
    ++first;
  }
  std::move(first, runs_.end(), std::back_inserter(tail));
  runs_.erase(first, runs_.end());
  return PinnedRange(context_, for_write_, form_, std::move(tail));
}

void PinnedRange::reset() {
  if (runs_.empty()) return;
  context_->release(runs_, for_write_, form_);
  runs_.clear();
}

}  // namespace mvgpu::domain
