// Misses, and first holds of pages that are cached: what makes a page cached, under the cache's
// lock.

#include <algorithm>
#include <bit>
#include <utility>

#include "apionly-domain/base/bits.h"
#include "apionly-domain/base/check.h"
#include "dma-cache/dma_cache.h"

namespace mvgpu::dma {

namespace {

// Takes the first of the pages named by `*bits`, and those behind it in the list that continue it.
PageRun TakeRun(std::span<const Iova> pages, uint64_t* bits) {
  size_t i = static_cast<size_t>(std::countr_zero(*bits));
  PageRun run{pages[i].page(), 0};
  for (; i < pages.size() && (*bits >> i & 1) != 0 && pages[i].page() == run.end(); ++i) {
    ++run.count;
    *bits &= ~(uint64_t{1} << i);
  }
  return run;
}

// The part of the run in `pages`, if any.
std::optional<domain::PinnedRun> Cut(const domain::PinnedRun& run, PageRun pages) {
  const auto part = run.iova.intersection(RangeOf(pages));
  return part ? std::optional(run.slice(*part)) : std::nullopt;
}

}  // namespace

Result<DmaCache::Held> DmaCache::HoldRange(DmaUser* user, PageRun pages, Direction direction,
                                           bool contiguous) {
  const uint64_t wanted = DmaUser::WantedFlags(AccessFor(direction));
  MutexLock lock(mutex_);
  MVGPU_ASSIGN_OR_RETURN(const uint64_t hits, HoldLocked(pages, direction, contiguous));
  Held held;
  held.epoch =
      user->AddHolds({&pages, 1}, IsForWrite(direction), {.map_calls = 1, .hit_pages = hits});
  const auto find = [this](uint64_t page) { return table_.find(page); };
  MVGPU_CHECK(DmaUser::AppendRuns(pages, wanted, find, &held.runs));
  return held;
}

Result<bool> DmaCache::HoldPages(DmaUser* user, const DmaUser::Batch& batch, uint64_t misses,
                                 uint64_t epoch) {
  const bool for_write = IsForWrite(batch.direction);
  std::array<PageRun, DmaUser::kBatch> runs;
  size_t count = 0;
  DmaUser::Figures figures;
  MutexLock lock(mutex_);
  if (user->epoch() != epoch) return false;  // from here on it stays: a new one takes the lock
  // What a pin waits for is its counter, if it has to: so all of them are asked for first.
  ForEachBit(misses,
             [&](size_t i) { pins_->prefetch(batch.pages[i], AccessFor(batch.direction)); });
  for (uint64_t left = misses; left != 0;) {
    const PageRun pages = TakeRun(batch.pages, &left);
    const auto hits = HoldLocked(pages, batch.direction, /*contiguous=*/false);
    if (!hits) {
      user->AddHolds(std::span(runs).first(count), for_write, figures);
      ReleaseLocked(user, std::span(runs).first(count), for_write, epoch);
      return tl::unexpected<Error>(hits.error());
    }
    runs[count++] = pages;
    figures.hit_pages += *hits;
  }
  figures.map_calls = 1;
  user->AddHolds(std::span(runs).first(count), for_write, figures);
  ForEachBit(misses, [&, table = &table_](size_t i) {
    const Iova iova = batch.pages[i];
    batch.addresses[i] =
        DmaAddr(BytesIn(table->find(iova.page()).target()) | iova.offset_in_page());
  });
  return true;
}

Result<uint64_t> DmaCache::HoldLocked(PageRun pages, Direction direction, bool contiguous) {
  if (contiguous && !IsContiguousLocked(pages)) {
    return tl::unexpected<Error>(NotContiguousError(pages));
  }
  MVGPU_RETURN_IF_ERROR(MakePlanLocked(pages, direction));
  Result<void> outcome = CarryOutLocked(direction);
  if (outcome && contiguous && !IsContiguousLocked(pages)) {
    outcome = tl::unexpected<Error>(NotContiguousError(pages));
  }
  if (!outcome) {
    UndoLocked(direction);
    return tl::unexpected<Error>(std::move(outcome).error());
  }
  if (IsForWrite(direction)) {
    // Nobody reads what was idle.
    for (const PageRun& idle : plan_.idle) DropPinLocked(idle, /*for_write=*/false);
  }
  uint64_t hits = pages.count;
  for (const PageRun& gap : plan_.gaps) hits -= gap.count;
  return hits;
}

Result<void> DmaCache::MakePlanLocked(PageRun pages, Direction direction) {
  const uint64_t wanted = DmaUser::WantedFlags(AccessFor(direction));
  const uint64_t pinned = PinnedFlag(IsForWrite(direction));
  plan_.gaps.clear();
  plan_.upgrades.clear();
  plan_.idle.clear();
  plan_.filled = plan_.upgraded = 0;
  bool usable = true;
  uint64_t next = pages.first;
  table_.for_each(pages, [&, plan = &plan_](const Extent& extent) {
    usable &= DmaUser::IsUsable(extent.flags, wanted);
    if (extent.pages.first > next) plan->gaps.push_back({next, extent.pages.first - next});
    next = extent.pages.end();
    if ((extent.flags & pinned) != 0) return;
    if (!plan->upgrades.empty() && plan->upgrades.back().end() == extent.pages.first) {
      plan->upgrades.back().count += extent.pages.count;
    } else {
      plan->upgrades.push_back(extent.pages);
    }
  });
  if (next < pages.end()) plan_.gaps.push_back({next, pages.end() - next});
  if (!usable) {
    // The domain knows why; if not, the mapper is the reason.
    MVGPU_RETURN_IF_ERROR(domain_->check(RangeOf(pages), AccessFor(direction)));
    return Fail(ErrorCode::kBusy, "pages that moved are being taken from their users");
  }
  idle_.take(pages, &plan_.idle);
  return {};
}

Result<void> DmaCache::CarryOutLocked(Direction direction) {
  const bool for_write = IsForWrite(direction);
  for (const PageRun& gap : plan_.gaps) {
    MVGPU_RETURN_IF_ERROR(FillLocked(gap, direction));
    ++plan_.filled;
  }
  for (const PageRun& pages : plan_.upgrades) {
    MVGPU_ASSIGN_OR_RETURN(auto pin, PinLocked(pages, AccessFor(direction)));
    const bool as_runs = pin.keep() == domain::PinCounts::Form::kRuns;
    table_.change_flags(pages, PinnedFlag(for_write) | (as_runs ? AsRunsFlag(for_write) : 0), 0);
    ++plan_.upgraded;
  }
  return {};
}

void DmaCache::UndoLocked(Direction direction) {
  DropLocked(std::span(plan_.gaps).first(plan_.filled));
  for (size_t i = 0; i < plan_.upgraded; ++i) {
    DropPinLocked(plan_.upgrades[i], IsForWrite(direction));
  }
  for (const PageRun& idle : plan_.idle) idle_.add(idle);
}

bool DmaCache::IsContiguousLocked(PageRun pages) const {
  std::optional<uint64_t> offset;  // from IOVA page to device page
  bool contiguous = true;
  table_.for_each(pages, [&](const Extent& extent) {
    const uint64_t here = extent.target - extent.pages.first;
    contiguous &= offset.value_or(here) == here;
    offset = here;
  });
  return contiguous;
}

// Pins the gap, then asks the mapper once for each part of it where the VMM's mapping allows the
// same: for all of it, as a rule.
Result<void> DmaCache::FillLocked(PageRun gap, Direction direction) {
  MVGPU_ASSIGN_OR_RETURN(domain::PinnedRange pin, PinLocked(gap, AccessFor(direction)));
  scratch_.requests.clear();
  {
    const domain::ApiOnlyDomain::Translator translator(*domain_);
    for (uint64_t page = gap.first; page < gap.end();) {
      const auto place = translator.place(Iova(BytesIn(page)));
      const uint64_t count = std::min(PagesIn(place.left), gap.end() - page);
      if (!scratch_.requests.empty() && scratch_.requests.back().access == place.access) {
        scratch_.requests.back().pages.count += count;
      } else {
        scratch_.requests.push_back({{page, count}, place.access});
      }
      page += count;
    }
  }
  MVGPU_RETURN_IF_ERROR(AskMapperLocked(pin.runs()));
  const bool for_write = IsForWrite(direction);
  const bool as_runs = pin.keep() == domain::PinCounts::Form::kRuns;
  const uint64_t pinned = PinnedFlag(for_write) | (as_runs ? AsRunsFlag(for_write) : 0);
  size_t answer = 0;
  for (const Request& request : scratch_.requests) {
    for (; answer < request.answer_end; ++answer) {
      const MappedRun& run = scratch_.mapped[answer];
      const PageRun pages = PagesOf(run.iova);
      table_.map(pages, run.address.page(), DmaUser::WantedFlags(request.access) | pinned);
      reverse_.add(pages, run.address.page());
    }
  }
  counters_.cached_pages += gap.count;
  counters_.miss_pages += gap.count;
  return {};
}

Result<void> DmaCache::AskMapperLocked(std::span<const domain::PinnedRun> runs) {
  std::vector<MappedRun>& mapped = scratch_.mapped;
  mapped.clear();
  for (Request& request : scratch_.requests) {
    std::span<const domain::PinnedRun> asked = runs;
    if (scratch_.requests.size() > 1) {
      scratch_.runs.clear();
      for (const domain::PinnedRun& run : runs) {
        if (const auto part = Cut(run, request.pages)) scratch_.runs.push_back(*part);
      }
      asked = scratch_.runs;
    }
    Result<void> outcome;
    do {
      outcome = mapper_->map(asked, request.access, &mapped);
    } while (!outcome && outcome.error().code() == ErrorCode::kLimit &&
             EvictLocked(request.pages.count));
    if (!outcome) {
      for (const MappedRun& run : mapped) mapper_->unmap(run.address, run.iova.size());
      if (!mapped.empty()) mapper_->flush();
      return outcome;
    }
    request.answer_end = mapped.size();
    ++counters_.mapper_calls;
  }
  return {};
}

Result<domain::PinnedRange> DmaCache::PinLocked(PageRun pages, domain::Access access) {
  for (;;) {
    auto pin = pins_->pin(RangeOf(pages), access);
    if (pin || pin.error().code() != ErrorCode::kLimit || !EvictLocked(pages.count)) return pin;
  }
}

}  // namespace mvgpu::dma
