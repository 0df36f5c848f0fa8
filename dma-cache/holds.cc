// Misses, and first holds of pages that are cached: what makes a page cached, under the cache's
// lock.

#include <algorithm>
#include <bit>
#include <utility>

#include "apionly-domain/base/bits.h"
#include "apionly-domain/base/check.h"
#include "apionly-domain/base/page_runs.h"
#include "dma-cache/dma_cache.h"

namespace mvgpu::dma {

namespace {

uint64_t PagesOfAll(std::span<const PageRun> runs) {
  uint64_t pages = 0;
  for (const PageRun& run : runs) pages += run.count;
  return pages;
}

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

// A page of a batch and its place there, as one number: page << 6 | place.
static_assert(DmaUser::kBatch == 64);
uint64_t PageOf(uint64_t key) { return key >> 6; }
size_t PlaceOf(uint64_t key) { return key & 63; }

// Sorts into buckets first, by the highest of the bits that differ somewhere, and what is left by
// insertion: a third of the time of std::sort for pages that lie anywhere, which mispredicts each
// other branch.
void SortKeys(std::span<uint64_t> keys, uint64_t differing) {
  const int shift = std::max(0, static_cast<int>(std::bit_width(differing)) - 6);
  const auto bucket_of = [shift](uint64_t key) { return key >> shift & 63; };
  std::array<uint8_t, DmaUser::kBatch + 1> next{};  // place, by bucket
  for (const uint64_t key : keys) ++next[bucket_of(key) + 1];
  for (size_t i = 1; i < next.size(); ++i) next[i] = static_cast<uint8_t>(next[i] + next[i - 1]);
  std::array<uint64_t, DmaUser::kBatch> rough;
  for (const uint64_t key : keys) rough[next[bucket_of(key)]++] = key;
  for (size_t i = 0; i < keys.size(); ++i) {
    size_t at = i;
    for (; at > 0 && keys[at - 1] > rough[i]; --at) keys[at] = keys[at - 1];
    keys[at] = rough[i];
  }
}

// The pages named by `bits` in ascending order. Returns how many.
size_t SortedKeys(std::span<const Iova> pages, uint64_t bits, std::span<uint64_t> keys) {
  size_t count = 0;
  bool ascending = true;
  uint64_t last = 0;
  uint64_t differing = 0;  // bits, in some two of the keys
  ForEachBit(bits, [&](size_t i) {
    const uint64_t key = pages[i].page() << 6 | i;
    keys[count] = key;
    ascending &= last <= key;
    differing |= count == 0 ? 0 : last ^ key;
    last = key;
    ++count;
  });
  if (!ascending) SortKeys(keys.first(count), differing);
  return count;
}

// The same, each once, as runs. Returns how many runs.
size_t RunsOf(std::span<const uint64_t> keys, std::span<PageRun> runs) {
  size_t made = 0;
  for (const uint64_t key : keys) {
    const uint64_t page = PageOf(key);
    if (made == 0 || page > runs[made - 1].end()) {
      runs[made++] = {page, 1};
    } else if (page == runs[made - 1].end()) {
      ++runs[made - 1].count;
    }
  }
  return made;
}

}  // namespace

Result<DmaCache::Held> DmaCache::HoldRange(DmaUser* user, PageRun pages, Direction direction,
                                           bool contiguous) {
  const uint64_t wanted = DmaUser::WantedFlags(AccessFor(direction));
  MutexLock lock(mutex_);
  pins_->prefetch(Iova(BytesIn(pages.first)), AccessFor(direction));
  MVGPU_ASSIGN_OR_RETURN(const uint64_t misses, HoldLocked({&pages, 1}, direction, contiguous));
  Held held;
  held.epoch = user->AddHolds({&pages, 1}, IsForWrite(direction),
                              {.map_calls = 1, .hit_pages = pages.count - misses});
  const auto find = [this](uint64_t page) { return table_.find(page); };
  MVGPU_CHECK(DmaUser::AppendRuns(pages, wanted, find, &held.runs));
  return held;
}

Result<bool> DmaCache::HoldPages(DmaUser* user, const DmaUser::Batch& batch, uint64_t misses,
                                 uint64_t epoch) {
  std::array<PageRun, DmaUser::kBatch> runs;
  MutexLock lock(mutex_);
  if (user->epoch() != epoch) return false;  // from here on it stays: a new one takes the lock
  // What a miss waits for is its counter, and the table, of which the user has looked at the entry:
  // so all are asked for first.
  for (const Iova page : batch.pages) {
    pins_->prefetch(page, AccessFor(batch.direction));
    table_.prefetch_granule(page.page());
  }
  std::array<uint64_t, DmaUser::kBatch> buffer;
  const size_t asked = SortedKeys(batch.pages, misses, buffer);
  const std::span<const uint64_t> keys = std::span(buffer).first(asked);
  size_t count = RunsOf(keys, runs);
  MVGPU_ASSIGN_OR_RETURN(const uint64_t missed, HoldLocked(std::span(runs).first(count),
                                                           batch.direction, /*contiguous=*/false));
  if (PagesOfAll(std::span(runs).first(count)) != asked) {  // some stand there more than once
    count = 0;
    for (uint64_t left = misses; left != 0;) runs[count++] = TakeRun(batch.pages, &left);
  }
  user->AddHolds(std::span(runs).first(count), IsForWrite(batch.direction),
                 {.map_calls = 1, .hit_pages = asked - missed});
  // All answers are single pages then, in this order.
  const bool answered_apart = missed == asked && scratch_.mapped.size() == asked;
  for (size_t i = 0; i < asked; ++i) {
    const size_t place = PlaceOf(keys[i]);
    const DmaAddr address = answered_apart
                                ? scratch_.mapped[i].address
                                : DmaAddr(BytesIn(table_.find(PageOf(keys[i])).target()));
    batch.addresses[place] = address + batch.pages[place].offset_in_page();
  }
  return true;
}

Result<uint64_t> DmaCache::HoldLocked(std::span<const PageRun> pages, Direction direction,
                                      bool contiguous) {
  if (contiguous && !IsContiguousLocked(pages.front())) {
    return tl::unexpected<Error>(NotContiguousError(pages.front()));
  }
  MVGPU_RETURN_IF_ERROR(MakePlanLocked(pages, direction));
  Result<void> outcome = CarryOutLocked(direction);
  if (outcome && contiguous && !IsContiguousLocked(pages.front())) {
    for (const PageRun& upgraded : plan_.upgrades) DropPinLocked(upgraded, IsForWrite(direction));
    DropLocked(plan_.gaps);
    outcome = tl::unexpected<Error>(NotContiguousError(pages.front()));
  }
  if (!outcome) {
    for (const PageRun& idle : plan_.idle) idle_.add(idle);
    return tl::unexpected<Error>(std::move(outcome).error());
  }
  if (IsForWrite(direction)) {
    // Nobody reads what was idle.
    for (const PageRun& idle : plan_.idle) DropPinLocked(idle, /*for_write=*/false);
  }
  return PagesOfAll(plan_.gaps);
}

Result<void> DmaCache::MakePlanLocked(std::span<const PageRun> pages, Direction direction) {
  const uint64_t wanted = DmaUser::WantedFlags(AccessFor(direction));
  const uint64_t pinned = PinnedFlag(IsForWrite(direction));
  plan_.gaps.clear();
  plan_.upgrades.clear();
  plan_.idle.clear();
  for (const PageRun& run : pages) {
    if (run.count == 1 && table_.find(run.first).word == 0) {  // a miss page by page
      plan_.gaps.push_back(run);
      continue;
    }
    bool usable = true;
    PlanRunLocked(run, wanted, pinned, &usable);
    if (!usable) {
      // The domain knows why; if not, the mapper is the reason.
      MVGPU_RETURN_IF_ERROR(domain_->check(RangeOf(run), AccessFor(direction)));
      return Fail(ErrorCode::kBusy, "pages that moved are being taken from their users");
    }
  }
  if (idle_.pages() == 0) return {};
  for (const PageRun& run : pages) idle_.take(run, &plan_.idle);
  return {};
}

void DmaCache::PlanRunLocked(PageRun pages, uint64_t wanted, uint64_t pinned, bool* usable) {
  uint64_t next = pages.first;
  table_.for_each(pages, [&, plan = &plan_](const Extent& extent) {
    *usable &= DmaUser::IsUsable(extent.flags, wanted);
    if (extent.pages.first > next) plan->gaps.push_back({next, extent.pages.first - next});
    next = extent.pages.end();
    if ((extent.flags & pinned) != 0) return;
    AppendRun(extent.pages, &plan->upgrades);
  });
  if (next < pages.end()) plan_.gaps.push_back({next, pages.end() - next});
}

Result<void> DmaCache::CarryOutLocked(Direction direction) {
  const bool for_write = IsForWrite(direction);
  domain::PinnedRange upgrade;  // first: it is the easier one to take back
  if (!plan_.upgrades.empty()) {
    MVGPU_ASSIGN_OR_RETURN(upgrade, PinLocked(plan_.upgrades, AccessFor(direction)));
  }
  if (!plan_.gaps.empty()) MVGPU_RETURN_IF_ERROR(FillGapsLocked(direction));
  if (plan_.upgrades.empty()) return {};
  const bool as_runs = upgrade.keep() == domain::PinCounts::Form::kRuns;
  for (const PageRun& pages : plan_.upgrades) {
    table_.change_flags(pages, PinnedFlag(for_write) | (as_runs ? AsRunsFlag(for_write) : 0), 0);
  }
  return {};
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

// Pins all gaps, then asks the mapper once for each part of one where the VMM's mapping allows the
// same, for all of it as a rule; and once for all such parts in a row that are one run each, as
// lone pages are.
Result<void> DmaCache::FillGapsLocked(Direction direction) {
  MVGPU_ASSIGN_OR_RETURN(domain::PinnedRange pin, PinLocked(plan_.gaps, AccessFor(direction)));
  MakeRequestsLocked(pin.runs());
  MVGPU_RETURN_IF_ERROR(AskMapperLocked());
  const bool for_write = IsForWrite(direction);
  const bool as_runs = pin.keep() == domain::PinCounts::Form::kRuns;
  EnterAnswersLocked(PinnedFlag(for_write) | (as_runs ? AsRunsFlag(for_write) : 0));
  return {};
}

inline void DmaCache::AddRunLocked(const domain::PinnedRun& run, uint64_t pages,
                                   domain::Access access) {
  scratch_.runs.push_back(run);
  std::vector<Request>& requests = scratch_.requests;
  if (!requests.empty() && requests.back().apart && requests.back().access == access) {
    requests.back().pages += pages;
    requests.back().runs_end = scratch_.runs.size();
  } else {
    requests.push_back({pages, access, /*apart=*/true, scratch_.runs.size()});
  }
}

void DmaCache::MakeRequestsLocked(std::span<const domain::PinnedRun> pinned) {
  scratch_.requests.clear();
  scratch_.runs.clear();
  const domain::ApiOnlyDomain::Translator translator(*domain_);
  for (const PageRun& gap : plan_.gaps) {
    if (gap.count == 1) {  // a miss page by page, and one run as it is
      const domain::PinnedRun& run = pinned.front();
      AddRunLocked(run, 1, translator.place(run.iova.start()).access);
      pinned = pinned.subspan(1);
      continue;
    }
    for (PageRun part{gap.first, 0}; part.first < gap.end(); part = {part.end(), 0}) {
      auto place = translator.place(Iova(BytesIn(part.first)));
      const domain::Access access = place.access;
      while (place.access == access) {
        part.count += std::min(PagesIn(place.left), gap.end() - part.end());
        if (part.end() == gap.end()) break;
        place = translator.place(Iova(BytesIn(part.end())));
      }
      AddRequestLocked(part, access, &pinned);
    }
  }
}

void DmaCache::AddRequestLocked(PageRun pages, domain::Access access,
                                std::span<const domain::PinnedRun>* pinned) {
  const IovaRange wanted = RangeOf(pages);
  if (const domain::PinnedRun& run = pinned->front(); run.iova.contains(wanted)) {
    AddRunLocked(run.iova == wanted ? run : run.slice(wanted), pages.count, access);
    if (run.iova.last() == wanted.last()) *pinned = pinned->subspan(1);
    return;
  }
  std::vector<domain::PinnedRun>& runs = scratch_.runs;
  while (!pinned->empty()) {
    const domain::PinnedRun& run = pinned->front();
    const auto part = run.iova.intersection(wanted);
    if (!part) break;
    runs.push_back(run.slice(*part));
    if (part->last() != run.iova.last()) break;  // the rest is the next one's
    *pinned = pinned->subspan(1);
  }
  scratch_.requests.push_back({pages.count, access, /*apart=*/false, runs.size()});
}

Result<void> DmaCache::AskMapperLocked() {
  scratch_.mapped.clear();
  const std::span<const domain::PinnedRun> runs = scratch_.runs;
  size_t first = 0;
  for (Request& request : scratch_.requests) {
    auto outcome = AskMapperLocked(&request, runs.subspan(first, request.runs_end - first));
    first = request.runs_end;
    if (outcome) continue;
    for (const MappedRun& run : scratch_.mapped) mapper_->unmap(run.address, run.iova.size());
    if (!scratch_.mapped.empty()) mapper_->flush();
    return outcome;
  }
  return {};
}

Result<void> DmaCache::AskMapperLocked(Request* request, std::span<const domain::PinnedRun> runs) {
  Result<void> outcome;
  do {
    outcome = request->apart ? mapper_->map_apart(runs, request->access, &scratch_.mapped)
                             : mapper_->map(runs, request->access, &scratch_.mapped);
  } while (!outcome && outcome.error().code() == ErrorCode::kLimit && EvictLocked(request->pages));
  request->answer_end = scratch_.mapped.size();
  counters_.mapper_calls += outcome ? 1 : 0;
  return outcome;
}

void DmaCache::EnterAnswersLocked(uint64_t pinned) {
  for (const MappedRun& run : scratch_.mapped) reverse_.prefetch(run.address.page());
  size_t answer = 0;
  for (const Request& request : scratch_.requests) {
    for (; answer < request.answer_end; ++answer) {
      const MappedRun& run = scratch_.mapped[answer];
      const PageRun pages = PagesOf(run.iova);
      table_.map(pages, run.address.page(), DmaUser::WantedFlags(request.access) | pinned);
      reverse_.add(pages, run.address.page());
    }
    counters_.cached_pages += request.pages;
    counters_.miss_pages += request.pages;
  }
}

Result<domain::PinnedRange> DmaCache::PinLocked(std::span<const PageRun> pages,
                                                domain::Access access) {
  for (;;) {
    auto pin = pins_->pin_misses(pages, access);
    if (pin || pin.error().code() != ErrorCode::kLimit) return pin;
    if (!EvictLocked(PagesOfAll(pages))) return pin;
  }
}

}  // namespace mvgpu::dma
