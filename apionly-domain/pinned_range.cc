#include "apionly-domain/pinned_range.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "apionly-domain/api_only_domain.h"

namespace mvgpu::domain {

PinnedRange::PinnedRange(ApiOnlyDomain* domain, PinOwner* owner, std::vector<PinnedRun> runs)
    : domain_(domain), owner_(owner), runs_(std::move(runs)) {}

PinnedRange::PinnedRange(PinnedRange&& other) noexcept
    : domain_(other.domain_), owner_(other.owner_), runs_(std::exchange(other.runs_, {})) {}

PinnedRange& PinnedRange::operator=(PinnedRange&& other) noexcept {
  if (this != &other) {
    reset();
    domain_ = other.domain_;
    owner_ = other.owner_;
    runs_ = std::exchange(other.runs_, {});
  }
  return *this;
}

PinnedRange PinnedRange::split_off(Iova at) {
  MVGPU_CHECK(at.is_page_aligned());
  auto first = std::find_if(runs_.begin(), runs_.end(),
                            [at](const PinnedRun& run) { return run.iova.last() >= at; });
  std::vector<PinnedRun> tail;
  if (first != runs_.end() && first->iova.start() < at) {
    tail.push_back(first->slice(IovaRange::FromFirstAndLast(at, first->iova.last())));
    *first = first->slice(IovaRange::FromFirstAndLast(first->iova.start(), Iova(at.value() - 1)));
    ++first;
  }
  std::move(first, runs_.end(), std::back_inserter(tail));
  runs_.erase(first, runs_.end());
  return PinnedRange(domain_, owner_, std::move(tail));
}

void PinnedRange::reset() {
  if (runs_.empty()) return;
  domain_->release(runs_, owner_);
  runs_.clear();
}

}  // namespace mvgpu::domain
