// How pages are taken away from their users: marked, told, dropped.

#include <algorithm>
#include <utility>

#include "apionly-domain/base/page_runs.h"
#include "dma-cache/dma_cache.h"

namespace mvgpu::dma {

void DmaCache::on_revoke(IovaRange range) { Revoke(range); }

void DmaCache::Revoke(IovaRange range) {
  const PageRun pages = PagesOf(range);
  MutexLock one_at_a_time(revoke_mutex_);
  std::vector<DmaUser*> holders;
  {
    MutexLock lock(mutex_);
    table_.change_flags(pages, Table::kGoing, 0);
    uint64_t revoked = 0;
    table_.for_each(pages, [&revoked](const Extent& extent) { revoked += extent.pages.count; });
    counters_.revoked_pages += revoked;
    std::vector<PageRun> idle;  // goes with the rest, without a word
    idle_.take(pages, &idle);
    // The users' locks are taken one after the other: a hit that did not see the mark is over then,
    // and is counted.
    for (DmaUser* user : users_) {
      if (user->SettleAll(pages)) holders.push_back(user);
    }
    counters_.revocations += holders.size();
  }
  // Nobody closes one of them: that takes the revocation lock.
  for (DmaUser* user : holders) user->owner_->on_revoke(range);
  MutexLock lock(mutex_);
  std::vector<PageRun> going;  // what was cached meanwhile is none of it
  table_.for_each(pages, [&going](const Extent& extent) {
    if ((extent.flags & Table::kGoing) != 0) going.push_back(extent.pages);
  });
  for (DmaUser* user : users_) user->Forget(going);
  DropLocked(going);
  ReclaimLocked();
}

uint64_t DmaCache::recheck() {
  constexpr PageRun kAllPages{0, uint64_t{1} << (64 - kPageShift)};
  std::vector<PageRun> moved;
  {
    MutexLock lock(mutex_);
    std::vector<Extent> extents;
    AppendExtents(kAllPages, &extents);
    for (const Extent& extent : extents) {
      if ((extent.flags & Table::kGoing) == 0) AppendMovedLocked(extent, &moved);
    }
  }
  uint64_t pages = 0;
  for (const PageRun& run : moved) {
    Revoke(RangeOf(run));
    pages += run.count;
  }
  return pages;
}

// The mapper wants to hear of contiguous host memory.
void DmaCache::AppendMovedLocked(const Extent& extent, std::vector<PageRun>* moved) {
  const domain::ApiOnlyDomain::Translator translator(*domain_);
  for (uint64_t page = extent.pages.first; page < extent.pages.end();) {
    const auto place = translator.place(Iova(BytesIn(page)));
    const uint64_t count = std::min(PagesIn(place.left), extent.pages.end() - page);
    const uint64_t device = extent.target + (page - extent.pages.first);
    AppendMovedPagesLocked({RangeOf({page, count}), place.host}, DmaAddr(BytesIn(device)), moved);
    page += count;
  }
}

// Halves what did not stay where it was, down to the pages.
void DmaCache::AppendMovedPagesLocked(const domain::PinnedRun& run, DmaAddr address,
                                      std::vector<PageRun>* moved) {
  if (mapper_->is_current(run, address)) return;
  const PageRun pages = run.iova_pages();
  if (pages.count == 1) {
    AppendRun(pages, moved);
    return;
  }
  const uint64_t half = pages.count / 2;
  const auto head = RangeOf({pages.first, half});
  const auto tail = RangeOf({pages.first + half, pages.count - half});
  AppendMovedPagesLocked(run.slice(head), address, moved);
  AppendMovedPagesLocked(run.slice(tail), address + BytesIn(half), moved);
}

}  // namespace mvgpu::dma
