// Last releases: what becomes idle, and what goes.

#include <algorithm>
#include <utility>

#include "apionly-domain/base/check.h"
#include "apionly-domain/base/page_runs.h"
#include "dma-cache/dma_cache.h"

namespace mvgpu::dma {

bool DmaCache::Release(DmaUser* user, std::span<const PageRun> pages, bool for_write,
                       uint64_t epoch) {
  MutexLock lock(mutex_);
  return ReleaseLocked(user, pages, for_write, epoch);
}

bool DmaCache::ReleaseLocked(DmaUser* user, std::span<const PageRun> pages, bool for_write,
                             uint64_t epoch) {
  scratch_.freed.clear();
  const bool held = user->RemoveHolds(pages, for_write, epoch, &scratch_.freed);
  LetGoLocked(user, &scratch_.freed, for_write);
  return held;
}

void DmaCache::LetGoLocked(const DmaUser* by, std::vector<PageRun>* pages, bool for_write) {
  for (DmaUser* user : users_) {
    if (pages->empty()) return;
    if (user == by) continue;
    scratch_.rest.clear();
    user->AppendUnheld(*pages, for_write, &scratch_.rest);
    pages->swap(scratch_.rest);
  }
  scratch_.released.clear();
  for (const PageRun& run : *pages) table_.prefetch(run.first);
  for (const PageRun& run : *pages) AppendExtents(run, &scratch_.released);
  scratch_.idle.clear();
  auto unused = scratch_.released.begin();
  for (const Extent& extent : scratch_.released) {
    if ((extent.flags & PinnedFlag(!for_write)) != 0) {
      DropPinLocked(extent.pages, for_write);  // others hold it for the other kind
    } else if (options_.idle_limit_pages != 0 && KeepIdleLocked(extent)) {
      AppendRun(extent.pages, &scratch_.idle);
    } else {
      if (&extent != &*unused) *unused = extent;
      ++unused;
    }
  }
  DropExtentsLocked({scratch_.released.begin(), unused});
  for (const PageRun& run : scratch_.idle) idle_.add(run);
  if (idle_.pages() > options_.idle_limit_pages) {
    EvictLocked(idle_.pages() - options_.idle_limit_pages);
  }
}

// Idle pages are pinned for reading: who may have written to them has let go.
bool DmaCache::KeepIdleLocked(const Extent& extent) {
  if ((extent.flags & Table::kGoing) != 0) return false;
  if ((extent.flags & Table::kPinnedRead) != 0) return true;
  auto pin = pins_->pin(RangeOf(extent.pages), domain::Access::kRead);
  if (!pin) return false;  // write-only, or about to be unmapped
  const bool as_runs = pin->keep() == domain::PinCounts::Form::kRuns;
  table_.change_flags(extent.pages,
                      Table::kPinnedRead | (as_runs ? Table::kReadAsRuns : uint64_t{0}), 0);
  DropPinLocked(extent.pages, /*for_write=*/true);
  return true;
}

void DmaCache::AppendExtents(PageRun pages, std::vector<Extent>* extents) const {
  table_.for_each(pages, [extents](const Extent& extent) { extents->push_back(extent); });
}

void DmaCache::UnpinLocked(std::span<const Extent> extents, bool for_write) {
  const domain::Access access = for_write ? domain::Access::kWrite : domain::Access::kRead;
  std::vector<PageRun>& runs = scratch_.unpinned;
  uint64_t flags = 0;
  for (const Extent& extent : extents) flags |= extent.flags;
  if ((flags & PinnedFlag(for_write)) == 0) return;
  for (const auto form : {domain::PinCounts::Form::kDense, domain::PinCounts::Form::kRuns}) {
    if (form == domain::PinCounts::Form::kRuns && (flags & AsRunsFlag(for_write)) == 0) return;
    const uint64_t as_runs =
        form == domain::PinCounts::Form::kRuns ? AsRunsFlag(for_write) : uint64_t{0};
    runs.clear();
    for (const Extent& extent : extents) {
      if ((extent.flags & PinnedFlag(for_write)) == 0) continue;
      if ((extent.flags & AsRunsFlag(for_write)) != as_runs) continue;
      AppendRun(extent.pages, &runs);
    }
    pins_->release_last(runs, access, form);
  }
}

void DmaCache::DropPinLocked(PageRun pages, bool for_write) {
  scratch_.dropped.clear();
  AppendExtents(pages, &scratch_.dropped);
  table_.change_flags(pages, 0, PinnedFlag(for_write) | AsRunsFlag(for_write));
  UnpinLocked(scratch_.dropped, for_write);
}

void DmaCache::DropLocked(std::span<const PageRun> pages) {
  scratch_.dropped.clear();
  for (const PageRun& run : pages) AppendExtents(run, &scratch_.dropped);
  DropExtentsLocked(scratch_.dropped);
}

void DmaCache::DropExtentsLocked(std::span<const Extent> extents) {
  if (extents.empty()) return;
  for (const Extent& extent : extents) reverse_.prefetch(extent.target);
  uint64_t pages = 0;
  for (const Extent& extent : extents) {
    mapper_->unmap(DmaAddr(BytesIn(extent.target)), BytesIn(extent.pages.count));
    reverse_.remove(extent.pages, extent.target);
    pages += extent.pages.count;
  }
  counters_.unmapped_pages += pages;
  counters_.cached_pages -= pages;
  mapper_->flush();
  for (const Extent& extent : extents) table_.unmap(extent.pages);
  // What is left of a piece is one: it must not look like a part of what is mapped here next.
  for (const Extent& extent : extents) table_.start_at(extent.pages.end());
  UnpinLocked(extents, /*for_write=*/false);
  UnpinLocked(extents, /*for_write=*/true);
  ReclaimLocked();
}

bool DmaCache::EvictLocked(uint64_t pages) {
  if (idle_.pages() == 0) return false;
  for (uint64_t gone = 0; gone < pages && idle_.pages() != 0;) {
    const PageRun oldest = idle_.take_oldest(pages - gone);
    DropLocked({&oldest, 1});
    gone += oldest.count;
    counters_.evicted_pages += oldest.count;
  }
  return true;
}

// A hit reads the table under its user's lock: who has taken all of these once has outlived every
// reader that could have seen a node that was taken out before.
void DmaCache::ReclaimLocked() {
  if (!table_.has_retired()) return;
  for (DmaUser* user : users_) SpinLockHold hold(user->lock_);
  table_.reclaim();
}

}  // namespace mvgpu::dma
