// How mappings go: marked, waited for, refused or removed.

#include <fmt/format.h>

#include <algorithm>

#include "apionly-domain/api_only_domain.h"

namespace mvgpu::domain {

Result<void> ApiOnlyDomain::on_unmap(const Unmapping& unmapping) {
  const Deadline deadline = std::chrono::steady_clock::now() + options_.unmap_deadline;
  for (const Mapping& mapping : unmapping.mappings) {
    if (mapping.file != nullptr) directory_.set_going(mapping.iova, true);
  }
  // From here on nothing new uses the mappings. What does already: copies, then pins.
  if (!slots_.wait_until_unused(unmapping.range, deadline)) {
    return Fail(ErrorCode::kBusy,
                fmt::format("{}: iova {:#x}-{:#x} stays mapped, a copy has not ended after {} ms",
                            options_.name, unmapping.range.start().value(),
                            unmapping.range.last().value(), options_.unmap_deadline.count()));
  }
  std::vector<PinOwner*> owners;
  {
    MutexLock lock(pin_mutex_);
    for (PinContext* context : HoldingContextsLocked(unmapping)) {
      if (std::find(owners.begin(), owners.end(), context->owner()) == owners.end()) {
        owners.push_back(context->owner());
      }
    }
    counters_.revocations += owners.size();
  }
  if (owners.empty()) return {};
  for (PinOwner* owner : owners) owner->on_revoke(unmapping.range);
  if (WaitForReleases(unmapping, deadline)) return {};
  return HeldError(unmapping);
}

// The contexts' locks are taken one after the other: a hit that did not see the mark is over then,
// and is counted.
std::vector<PinContext*> ApiOnlyDomain::HoldingContextsLocked(const Unmapping& unmapping) const {
  std::vector<PinContext*> holding;
  for (PinContext* context : contexts_) {
    SpinLockHold hold(context->lock_);
    const bool holds =
        std::any_of(unmapping.mappings.begin(), unmapping.mappings.end(),
                    [&](const Mapping& mapping) ABSL_EXCLUSIVE_LOCKS_REQUIRED(context->lock_) {
                      const PageRun pages = PagesOf(mapping.iova);
                      return context->counts_[0].any(pages) || context->counts_[1].any(pages);
                    });
    if (holds) holding.push_back(context);
  }
  return holding;
}

bool ApiOnlyDomain::WaitForReleases(const Unmapping& unmapping, Deadline deadline) {
  MutexLock lock(pin_mutex_);
  unmap_waits_ = true;  // one unmap at a time: the container's change lock
  bool in_time = true;
  while (!HoldingContextsLocked(unmapping).empty() && in_time) {
    in_time = released_.wait_until(pin_mutex_, deadline) == std::cv_status::no_timeout;
  }
  unmap_waits_ = false;
  return HoldingContextsLocked(unmapping).empty();
}

tl::unexpected<Error> ApiOnlyDomain::HeldError(const Unmapping& unmapping) const {
  std::string names;
  for (const Holder& holder : holders(unmapping.range)) {
    names += fmt::format("{}{} ({} pages from {:#x} on)", names.empty() ? "" : ", ", holder.owner,
                         holder.pages, holder.first.value());
  }
  return Fail(ErrorCode::kBusy,
              fmt::format("{}: iova {:#x}-{:#x} stays mapped, after {} ms it is still held by {}",
                          options_.name, unmapping.range.start().value(),
                          unmapping.range.last().value(), options_.unmap_deadline.count(), names));
}

void ApiOnlyDomain::on_unmap_done(const Unmapping& unmapping, bool unmapped) {
  if (!unmapped) {
    for (const Mapping& mapping : unmapping.mappings) {
      if (mapping.file != nullptr) directory_.set_going(mapping.iova, false);
    }
    return;
  }
  for (const Mapping& mapping : unmapping.mappings) {
    if (mapping.file == nullptr) {
      RemoveFileless(mapping.iova);
    } else {
      directory_.unmap(mapping.iova);
      if (ledger_row_ != nullptr) ledger_row_->unlist_mapping(mapping.iova);
    }
  }
  {
    MutexLock lock(pin_mutex_);
    for (const Mapping& mapping : unmapping.mappings) {
      if (mapping.file == nullptr) continue;
      files_.remove(mapping);
      counters_.mapped_pages -= mapping.pages();
    }
    if (ledger_row_ != nullptr) ledger_row_->set_mapped_pages(counters_.mapped_pages);
    for (PinContext* context : contexts_) {
      SpinLockHold hold(context->lock_);
      for (PinCounts& counts : context->counts_) counts.trim(PagesOf(unmapping.range));
    }
  }
  FreeRetiredTables();
}

void ApiOnlyDomain::RemoveFileless(IovaRange range) {
  MutexLock lock(fileless_mutex_);
  const auto it = std::prev(fileless_.upper_bound(range.start().value()));
  const Mapping whole = it->second;
  fileless_.erase(it);
  const auto keep = [&](Iova first, Iova last) ABSL_EXCLUSIVE_LOCKS_REQUIRED(fileless_mutex_) {
    const auto part = IovaRange::FromFirstAndLast(first, last);
    fileless_.emplace(first.value(), whole.slice(part));
  };
  if (whole.iova.start() < range.start()) {
    keep(whole.iova.start(), Iova(range.start().value() - 1));
  }
  if (range.last() < whole.iova.last()) keep(range.last() + 1, whole.iova.last());
}

// A table may go when nobody who looked it up can still be reading it: lookups happen in sections
// of the access slots, under a context's lock, or under the pin lock.
void ApiOnlyDomain::FreeRetiredTables() {
  PageDirectory::RetiredTables retired = directory_.take_retired();
  if (retired.empty()) return;
  slots_.wait_for_lookups();
  {
    MutexLock lock(pin_mutex_);
    for (PinContext* context : contexts_) SpinLockHold hold(context->lock_);
  }
  directory_.recycle(std::move(retired));
}

}  // namespace mvgpu::domain
