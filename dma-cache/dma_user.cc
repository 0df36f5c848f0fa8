#include "dma-cache/dma_user.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <utility>

#include "apionly-domain/base/bits.h"
#include "apionly-domain/base/check.h"
#include "apionly-domain/base/page_runs.h"
#include "dma-cache/dma_cache.h"
#include "dma-cache/near_targets.h"

namespace mvgpu::dma {

namespace {

constexpr uint64_t Bit(size_t i) { return uint64_t{1} << i; }

// ForEachBit() of the lowest `count` bits, faster where that is all of them.
template <typename Visit>
[[gnu::always_inline]] inline void ForEachOf(uint64_t bits, size_t count, const Visit& visit) {
  if (bits != LowestBits(count)) return ForEachBit(bits, visit);
  for (size_t i = 0; i < count; ++i) visit(i);
}

// The first look of both calls nothing, and is enough for nearly all hits.
bool TryAdd(domain::PinCounts* counts, PageRun pages) {
  const auto form = domain::PinCounts::FormFor(pages.count);
  return (form == domain::PinCounts::Form::kDense && domain::PageCounters::Near::has(pages) &&
          domain::PageCounters::Near(counts->dense()).try_add(pages)) ||
         counts->try_add(pages, form);
}
bool TryRemove(domain::PinCounts* counts, PageRun pages) {
  const auto form = domain::PinCounts::FormFor(pages.count);
  return (form == domain::PinCounts::Form::kDense && domain::PageCounters::Near::has(pages) &&
          domain::PageCounters::Near(counts->dense()).try_remove(pages)) ||
         counts->try_remove(pages, form);
}

}  // namespace

DmaUser::~DmaUser() { cache_.CloseUser(this); }

Result<DmaMapping> DmaUser::map(IovaRange range, Direction direction) {
  return Map(range, direction, /*contiguous=*/false);
}

Result<DmaMapping> DmaUser::map_contiguous(IovaRange range, Direction direction) {
  return Map(range, direction, /*contiguous=*/true);
}

Result<DmaMapping> DmaUser::Map(IovaRange range, Direction direction, bool contiguous) {
  const PageRun pages = PagesOf(range);
  Result<DmaMapping> mapping;  // filled where it is: moving one costs as much as a hit
  mapping->user_ = this;
  mapping->for_write_ = IsForWrite(direction);
  if (!TryMap(pages, direction, &*mapping)) [[unlikely]] {
    auto held = cache_.HoldRange(this, pages, direction, contiguous);
    if (!held) {
      mapping = tl::unexpected<Error>(std::move(held).error());
      return mapping;
    }
    mapping->epoch_ = held->epoch;
    mapping->runs_ = std::move(held->runs);
  } else if (contiguous && mapping->runs().size() > 1) {
    const Error error = DmaCache::NotContiguousError(pages);
    mapping->reset();
    mapping = tl::unexpected<Error>(error);
  }
  return mapping;
}

bool DmaUser::TryMap(PageRun pages, Direction direction, DmaMapping* mapping) {
  const uint64_t wanted = WantedFlags(AccessFor(direction));
  const auto find = [this](uint64_t page) { return table_.find_near(page); };
  SpinLockHold hold(lock_);
  if (!AppendRuns(pages, wanted, find, &mapping->runs_) ||
      !TryAdd(&CountsLocked(IsForWrite(direction)), pages)) {
    mapping->runs_.clear();  // nothing is held
    return false;
  }
  mapping->epoch_ = epoch_;
  ++figures_.map_calls;
  figures_.hit_pages += pages.count;
  return true;
}

void DmaUser::Release(PageRun pages, bool for_write, uint64_t epoch) {
  {
    SpinLockHold hold(lock_);
    if ((epoch == epoch_ || revoked_.empty()) && TryRemove(&CountsLocked(for_write), pages)) {
      return;
    }
  }
  MVGPU_CHECK(cache_.Release(this, {&pages, 1}, for_write, epoch));
}

bool DmaUser::IsValid(PageRun pages, uint64_t epoch) {
  SpinLockHold hold(lock_);
  return epoch == epoch_ || !revoked_.any(pages, epoch);
}

Result<uint64_t> DmaUser::map_pages(std::span<const Iova> pages, Direction direction,
                                    std::span<DmaAddr> addresses) {
  MVGPU_DCHECK(pages.size() == addresses.size());
  for (;;) {
    std::optional<uint64_t> epoch;
    MVGPU_ASSIGN_OR_RETURN(const bool done, TryMapPages(pages, direction, addresses, &epoch));
    if (done) return epoch.value_or(0);
    // The vmm took pages of this user away between two batches: once more, in the new epoch. It
    // takes the vmm a message each time.
  }
}

Result<bool> DmaUser::TryMapPages(std::span<const Iova> pages, Direction direction,
                                  std::span<DmaAddr> addresses, std::optional<uint64_t>* epoch) {
  for (size_t done = 0; done < pages.size(); done += kBatch) {
    const size_t count = std::min(kBatch, pages.size() - done);
    auto mapped =
        MapBatch({pages.subspan(done, count), direction, addresses.subspan(done, count)}, epoch);
    if (!mapped || !*mapped) [[unlikely]] {
      if (done != 0) {
        MVGPU_CHECK(unmap_pages(pages.first(done), direction, **epoch).has_value());
      }
      return mapped;
    }
  }
  return true;
}

Result<bool> DmaUser::MapBatch(const Batch& batch, std::optional<uint64_t>* epoch) {
  uint64_t misses = 0;
  if (!MapHits(batch, epoch, &misses)) return false;
  if (misses == 0) [[likely]] {
    return true;
  }
  auto mapped = cache_.HoldPages(this, batch, misses, **epoch);
  if (mapped && *mapped) return mapped;
  // As the holds of single pages that they are: some may be recent ones.
  ForEachBit(~misses & LowestBits(batch.pages.size()), [&](size_t i) {
    MVGPU_CHECK(unmap_pages(batch.pages.subspan(i, 1), batch.direction, **epoch).has_value());
  });
  return mapped;
}

bool DmaUser::MapHits(const Batch& batch, std::optional<uint64_t>* epoch, uint64_t* misses) {
  SpinLockHold hold(lock_);
  if (epoch->value_or(epoch_) != epoch_) return false;
  *epoch = epoch_;
  RecentHolds& recent = RecentLocked(IsForWrite(batch.direction));
  uint64_t missed = recent.add(batch.pages, batch.addresses);
  if (const uint64_t others = missed; others != 0) {
    missed = AddToOthers(batch, others);
    if (recent.is_open()) EnterLocked(batch, others & ~missed);
  }
  figures_.map_calls += missed == 0 ? 1 : 0;
  figures_.hit_pages += batch.pages.size() - static_cast<size_t>(std::popcount(missed));
  *misses = missed;
  return true;
}

void DmaUser::EnterLocked(const Batch& batch, uint64_t pages) {
  const bool for_write = IsForWrite(batch.direction);
  Counters& counters = CountsLocked(for_write).dense();
  RecentHolds& recent = RecentLocked(for_write);
  ForEachBit(pages, [&](size_t i) {
    const uint64_t page = batch.pages[i].page();
    if (!counters.try_remove_one(page)) return;  // a run holds it
    if (!recent.enter(page, batch.addresses[i])) counters.try_add_one(page);
  });
}

// In two passes, as PinContext::PinHits() and for its reasons: the first asks for the entries and
// the counters, which lie anywhere in many megabytes; by the time of the second they are there.
// Neither calls anything. What is not held exactly once is left to AddToMany().
uint64_t DmaUser::AddToOthers(const Batch& batch, uint64_t others) {
  const std::span<const Iova> pages = batch.pages;
  const uint64_t wanted = WantedFlags(AccessFor(batch.direction));
  std::array<uint64_t, kBatch> found;
  std::array<uint64_t*, kBatch> words;
  const NearTargets table(table_);
  const Counters::Near counters(CountsLocked(IsForWrite(batch.direction)).dense());
  ForEachOf(others, pages.size(), [&](size_t i) {
    found[i] = table.look_up(pages[i].page());
    words[i] = counters.word_of(pages[i].page());
    __builtin_prefetch(words[i], /*rw=*/1);
  });
  uint64_t missed = 0;
  uint64_t unusable = 0;
  ForEachOf(others, pages.size(), [&](size_t i) {
    const uint64_t page = pages[i].page();
    const uint64_t word = NearTargets::WordOf(found[i]);
    batch.addresses[i] = DmaAddr((word & ~kPageMask) | pages[i].offset_in_page());
    if (!IsUsable(word, wanted)) [[unlikely]] {
      unusable |= Bit(i);
    } else if (!Counters::Near::TryAddOne(words[i], page)) [[unlikely]] {
      missed |= Bit(i);
    }
  });
  return missed == 0 ? unusable : unusable | AddToMany(batch, missed);
}

Result<void> DmaUser::unmap_pages(std::span<const Iova> pages, Direction direction,
                                  uint64_t epoch) {
  const bool for_write = IsForWrite(direction);
  for (size_t done = 0; done < pages.size(); done += kBatch) {
    const auto batch = pages.subspan(done, std::min(kBatch, pages.size() - done));
    const uint64_t misses = UnmapHits(batch, for_write, epoch);
    if (misses == 0) [[likely]] {
      continue;
    }
    std::array<PageRun, kBatch> left;
    size_t count = 0;
    ForEachBit(misses, [&](size_t i) { left[count++] = {batch[i].page(), 1}; });
    if (!cache_.Release(this, std::span(left).first(count), for_write, epoch)) {
      return Fail(ErrorCode::kInvalid,
                  fmt::format("a page of the {} from iova {:#x} on is released, but its user does "
                              "not hold it since epoch {}",
                              batch.size(), batch.front().value(), epoch));
    }
  }
  return {};
}

// Returns the pages that it did not release.
uint64_t DmaUser::UnmapHits(std::span<const Iova> pages, bool for_write, uint64_t epoch) {
  SpinLockHold hold(lock_);
  if (epoch != epoch_ && (epoch > epoch_ || !revoked_.empty())) return LowestBits(pages.size());
  const uint64_t missed = RecentLocked(for_write).remove(pages);
  return missed == 0 ? 0 : RemoveFromOthers(pages, for_write, missed);
}

uint64_t DmaUser::RemoveFromOthers(std::span<const Iova> pages, bool for_write, uint64_t others) {
  std::array<uint64_t*, kBatch> words;
  const Counters::Near counters(CountsLocked(for_write).dense());
  uint64_t address_bits = 0;
  ForEachOf(others, pages.size(), [&](size_t i) {
    address_bits |= pages[i].value();
    words[i] = counters.word_of(pages[i].page());
    __builtin_prefetch(words[i], /*rw=*/1);
  });
  if (Iova(address_bits).page() >= Counters::kNearPages) [[unlikely]] {
    return RemoveFromMany(pages, for_write, others);
  }
  uint64_t last = 0;  // holds, but for those of a run
  uint64_t many = 0;
  ForEachOf(others, pages.size(), [&](size_t i) {
    const uint64_t page = pages[i].page();
    if (Counters::Near::TryRemoveOne(words[i], page)) return;
    uint64_t& kind = Counters::Near::IsHeldOnce(words[i], page) ? last : many;
    kind |= Bit(i);
  });
  if (CountsLocked(for_write).has_runs()) many |= std::exchange(last, 0);
  return many == 0 ? last : last | RemoveFromMany(pages, for_write, many);
}

uint64_t DmaUser::AddToMany(const Batch& batch, uint64_t pages) {
  domain::PinCounts& counts = CountsLocked(IsForWrite(batch.direction));
  uint64_t missed = pages;
  ForEachBit(pages, [&](size_t i) {
    const uint64_t page = batch.pages[i].page();
    if (counts.dense().try_add_one(page) ||
        (counts.has_runs() && counts.try_add({page, 1}, Form::kDense))) {  // as a part of a run
      missed &= ~Bit(i);
    }
  });
  return missed;
}

uint64_t DmaUser::RemoveFromMany(std::span<const Iova> batch, bool for_write, uint64_t pages) {
  domain::PinCounts& counts = CountsLocked(for_write);
  uint64_t missed = pages;
  ForEachBit(pages, [&](size_t i) {
    const uint64_t page = batch[i].page();
    domain::PageCounters& dense = counts.dense();
    if (dense.try_remove_one(page) ||
        (counts.has_runs() && dense.holds(page) &&
         counts.try_remove({page, 1}, Form::kDense))) {  // a run holds it too
      missed &= ~Bit(i);
    }
  });
  return missed;
}

uint64_t DmaUser::AddHolds(std::span<const PageRun> pages, bool for_write, const Figures& figures) {
  SpinLockHold hold(lock_);
  domain::PinCounts& counts = CountsLocked(for_write);
  for (const PageRun& run : pages) {
    if (run.count == 1 && counts.dense().try_add_first(run.first)) continue;
    counts.add(run, domain::PinCounts::FormFor(run.count));
  }
  figures_.map_calls += figures.map_calls;
  figures_.hit_pages += figures.hit_pages;
  return epoch_;
}

uint64_t DmaUser::epoch() {
  SpinLockHold hold(lock_);
  return epoch_;
}

bool DmaUser::RemoveHolds(std::span<const PageRun> pages, bool for_write, uint64_t epoch,
                          std::vector<PageRun>* freed) {
  SpinLockHold hold(lock_);
  if (epoch > epoch_) return false;
  domain::PinCounts& counts = CountsLocked(for_write);
  const bool all_real = epoch == epoch_ || revoked_.empty();
  for (const PageRun& run : pages) {
    SettleLocked(run, for_write);
    const auto form = domain::PinCounts::FormFor(run.count);
    if (all_real && run.count == 1) {
      if (!counts.has_runs() && counts.dense().try_remove_last(run.first)) {
        AppendRun(run, freed);
        continue;
      }
      if (!counts.dense().holds(run.first)) return false;
      counts.remove(run, form, freed);
      continue;
    }
    real_.clear();
    if (all_real) {
      real_.push_back(run);
    } else {
      revoked_.release(run, epoch, &real_);
    }
    for (const PageRun& part : real_) {
      // Handles hold what they say; of single pages it is the caller who says so.
      if (part.count == 1 && form == Form::kDense && !counts.dense().holds(part.first)) {
        return false;
      }
      counts.remove(part, form, freed);
    }
  }
  return true;
}

void DmaUser::AppendUnheld(const std::vector<PageRun>& pages, bool for_write,
                           std::vector<PageRun>* unheld) {
  SpinLockHold hold(lock_);
  for (const PageRun& run : pages) CountsLocked(for_write).append_unheld(run, unheld);
}

void DmaUser::SettleLocked(PageRun pages, bool for_write) {
  domain::PinCounts& counts = CountsLocked(for_write);
  RecentLocked(for_write).take(pages, [&counts](uint64_t page, uint64_t holds) {
    for (; holds != 0; --holds) counts.add({page, 1}, Form::kDense);
  });
}

bool DmaUser::SettleAll(PageRun pages) {
  SpinLockHold hold(lock_);
  for (const bool for_write : {false, true}) SettleLocked(pages, for_write);
  return counts_[0].any(pages) || counts_[1].any(pages);
}

void DmaUser::Forget(std::span<const PageRun> pages) {
  std::vector<std::pair<PageRun, uint64_t>> forgotten;  // pages, holds of each
  SpinLockHold hold(lock_);
  for (const PageRun& run : pages) {
    for (domain::PinCounts& counts : counts_) {
      counts.forget(
          run, [&forgotten](PageRun part, uint64_t holds) { forgotten.emplace_back(part, holds); });
      counts.trim(run);
    }
  }
  if (!forgotten.empty()) ++epoch_;
  for (const auto& [run, holds] : forgotten) revoked_.add(run, holds, epoch_);
}

bool DmaUser::IsEmpty() {
  SpinLockHold hold(lock_);
  return counts_[0].empty() && counts_[1].empty() && revoked_.empty();
}

DmaUser::Figures DmaUser::figures() {
  SpinLockHold hold(lock_);
  return figures_;
}

}  // namespace mvgpu::dma
