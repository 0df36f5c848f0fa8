#include "apionly-domain/pin/pin_context.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <optional>

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/base/bits.h"
#include "apionly-domain/base/check.h"

namespace mvgpu::domain {

namespace {

size_t CountBits(uint64_t bits) { return bits == 0 ? 0 : static_cast<size_t>(std::popcount(bits)); }

// The first of the pages named by `bits` that is counted less often than it stands among them.
std::optional<Iova> FirstUnheld(const PageCounters& counters, std::span<const Iova> pages,
                                uint64_t bits) {
  std::optional<Iova> unheld;
  ForEachBit(bits, [&](size_t i) {
    uint64_t wanted = 0;
    ForEachBit(bits, [&](size_t k) { wanted += pages[k].page() == pages[i].page() ? 1 : 0; });
    if (!unheld && counters.count(pages[i].page()) < wanted) unheld = pages[i];
  });
  return unheld;
}

}  // namespace

PinContext::~PinContext() {
  {
    SpinLockHold hold(lock_);
    MVGPU_CHECK(counts_[0].empty() && counts_[1].empty());
  }
  domain_.CloseContext(this);
}

// Hits are the work of Try...(): they call nothing and leave everything unusual to their slow
// twins, so that the compiler has few values to save. A pin and release of 64 pages takes 280
// instructions so, and took 520. What a hit waits for is the cache line of a counter: the fewer
// instructions lie between two of them, the sooner the processor comes to ask for the next one.

// The result is filled where it is and returned in one place, so that it is the caller's from the
// beginning: moving one costs as much as a hit.
Result<PinnedRange> PinContext::pin(IovaRange range, Access access) {
  Result<PinnedRange> pinned;
  if (!TryPin(range.page_expanded(), access, &*pinned)) [[unlikely]] {
    PinSlowly(range.page_expanded(), access, &pinned);
  }
  return pinned;
}

inline bool PinContext::TryPin(IovaRange pages, Access access, PinnedRange* pinned) {
  const PageRun run = PagesOf(pages);
  if (PinCounts::FormFor(run.count) != PinCounts::Form::kDense) return false;
  PrefetchCounter(run.first, IsForWrite(access));
  if (!lock_.try_lock()) return false;
  std::byte* host = nullptr;
  const PageCounters::Near counters(CountsLocked(IsForWrite(access)).dense());
  const bool hit =
      PageDirectory::Near(domain_.directory_).find(pages, static_cast<uint64_t>(access), &host) &&
      counters.try_add(run);
  if (hit) CountPinLocked(run.count);
  lock_.unlock();
  if (!hit) return false;
  pinned->context_ = this;
  pinned->for_write_ = IsForWrite(access);
  pinned->runs_.set_one({pages, host});
  return true;
}

void PinContext::PinSlowly(IovaRange pages, Access access, Result<PinnedRange>* pinned) {
  const auto form = PinCounts::FormFor(PagesOf(pages).count);
  PinnedRuns runs;  // in the handle only when they are pinned
  if (!TryPinPieces(pages, access, form, &runs)) {
    const PageRun run = PagesOf(pages);
    auto held = domain_.PinMiss(this, {&run, 1}, access, form, &runs);
    if (!held) {
      *pinned = tl::unexpected<Error>(std::move(held).error());
      return;
    }
  }
  (*pinned)->context_ = this;
  (*pinned)->for_write_ = IsForWrite(access);
  (*pinned)->form_ = form;
  (*pinned)->runs_ = std::move(runs);
}

Result<PinnedRange> PinContext::pin_misses(std::span<const PageRun> pages, Access access) {
  uint64_t largest = 0;
  for (const PageRun& run : pages) largest = std::max(largest, run.count);
  PinnedRange pinned(this, IsForWrite(access), PinCounts::FormFor(largest));
  PinnedRuns runs;  // in the handle only when they are pinned
  MVGPU_RETURN_IF_ERROR(domain_.PinMiss(this, pages, access, pinned.form_, &runs));
  pinned.runs_ = std::move(runs);
  return pinned;
}

Result<void> PinContext::pin_kept(PageRun pages, Access access) {
  PinnedRuns runs;
  return domain_.PinMiss(this, {&pages, 1}, access, PinCounts::FormFor(pages.count), &runs);
}

void PinContext::release_last(std::span<const PageRun> pages, Access access, PinCounts::Form form) {
  if (!pages.empty()) domain_.ReleaseMiss(this, pages, IsForWrite(access), form);
}

bool PinContext::TryPinPieces(IovaRange pages, Access access, PinCounts::Form form,
                              PinnedRuns* runs) {
  SpinLockHold hold(lock_);
  PinCounts& counts = CountsLocked(IsForWrite(access));
  if (!counts.holds(PagesOf(pages).first)) return false;
  const auto stop =
      domain_.directory_.walk(pages, static_cast<uint64_t>(access), [runs](auto extent) {
        runs->push_back({extent.iova, extent.host});
      });
  if (stop || !counts.try_add(PagesOf(pages), form)) {
    runs->clear();  // they are not pinned
    return false;
  }
  CountPinLocked(PagesOf(pages).count);
  return true;
}

void PinContext::ReleaseRun(PageRun run, bool for_write, PinCounts::Form form) {
  if (!TryReleaseRun(run, for_write, form)) [[unlikely]] {
    ReleaseSlowly(run, for_write, form);
  }
}

inline bool PinContext::TryReleaseRun(PageRun run, bool for_write, PinCounts::Form form) {
  if (form != PinCounts::Form::kDense || !PageCounters::Near::has(run)) return false;
  if (!lock_.try_lock()) return false;
  const bool hit = PageCounters::Near(CountsLocked(for_write).dense()).try_remove(run);
  if (hit) figures_.pinned_pages -= run.count;
  lock_.unlock();
  return hit;
}

void PinContext::ReleaseSlowly(PageRun run, bool for_write, PinCounts::Form form) {
  {
    SpinLockHold hold(lock_);
    if (CountsLocked(for_write).try_remove(run, form)) {
      figures_.pinned_pages -= run.count;
      return;
    }
  }
  domain_.ReleaseMiss(this, {&run, 1}, for_write, form);
}

Result<void> PinContext::pin_pages(std::span<const Iova> pages, Access access,
                                   std::span<std::byte*> host) {
  MVGPU_DCHECK(pages.size() == host.size());
  if (pages.size() == 1 && TryPinPage(pages.front(), access, &host.front())) return {};
  return PinBatches(pages, access, host);
}

Result<void> PinContext::PinBatches(std::span<const Iova> pages, Access access,
                                    std::span<std::byte*> host) {
  uint64_t calls = 0;
  for (size_t done = 0; done < pages.size();) {
    const size_t count = std::min(kBatch, pages.size() - done);
    auto pinned = PinBatch(pages.subspan(done, count), access, host.subspan(done, count), &calls);
    if (!pinned) [[unlikely]] {
      MVGPU_CHECK(unpin_pages(pages.first(done), access).has_value());
      ForgetPins(calls, done);
      return pinned;
    }
    done += count;
  }
  return {};
}

Result<void> PinContext::PinBatch(std::span<const Iova> pages, Access access,
                                  std::span<std::byte*> host, uint64_t* calls) {
  uint64_t misses = 0;
  MVGPU_RETURN_IF_ERROR(PinHits(pages, access, host, &misses));
  uint64_t own_calls = CountBits(misses) == pages.size() ? 0 : 1;
  if (misses == 0) [[likely]] {
    *calls += own_calls;
    return {};
  }
  Result<void> outcome;
  uint64_t undone = misses;
  ForEachBit(misses, [&](size_t i) {
    if (!outcome) return;
    auto pinned = pin(IovaRange::FromFirstAndLast(pages[i], pages[i]), access);
    if (!pinned) {
      outcome = tl::unexpected<Error>(std::move(pinned).error());
      return;
    }
    ++own_calls;
    undone &= undone - 1;
    host[i] = pinned->runs().front().host + pages[i].offset_in_page();
    pinned->runs_.clear();  // the page stays pinned, without the handle
  });
  if (outcome) {
    *calls += own_calls;
    return outcome;
  }
  for (size_t i = 0; i < pages.size(); ++i) {
    if ((undone >> i & 1) != 0) continue;
    ReleaseRun({pages[i].page(), 1}, IsForWrite(access), PinCounts::Form::kDense);
  }
  ForgetPins(own_calls, pages.size() - CountBits(undone));
  return outcome;
}

void PinContext::ForgetPins(uint64_t calls, uint64_t pages) {
  SpinLockHold hold(lock_);
  figures_.pin_calls -= calls;
  figures_.pages_pinned -= pages;
}

// What the batch does, without its arrays: half the time for a page alone.
inline bool PinContext::TryPinPage(Iova page, Access access, std::byte** host) {
  PrefetchCounter(page.page(), IsForWrite(access));
  if (!lock_.try_lock()) return false;
  const PageCounters::Near counters(CountsLocked(IsForWrite(access)).dense());
  const bool hit =
      PageDirectory::Near(domain_.directory_).find(page, static_cast<uint64_t>(access), host) &&
      counters.try_add({page.page(), 1});
  if (hit) CountPinLocked(1);
  lock_.unlock();
  return hit;
}

inline bool PinContext::TryUnpinPage(Iova page, Access access) {
  return TryReleaseRun({page.page(), 1}, IsForWrite(access), PinCounts::Form::kDense);
}

// In two passes: the first looks translations up and asks for the counters, which lie anywhere in
// 4 MiB for 64 GiB of memory; by the time of the second they are there. A pass that did both would
// wait for each. Neither calls anything, and the branch for a page that is no hit is never taken:
// so a page costs about 45 instructions, and a batch one lock.
Result<void> PinContext::PinHits(std::span<const Iova> pages, Access access,
                                 std::span<std::byte*> host, uint64_t* misses) {
  const auto wanted = static_cast<uint64_t>(access);
  std::array<uint64_t*, kBatch> words;
  {
    SpinLockHold hold(lock_);
    const PageDirectory::Near directory(domain_.directory_);
    const PageCounters::Near counters(CountsLocked(IsForWrite(access)).dense());
    size_t usable = 0;
    for (; usable < pages.size(); ++usable) {
      if (!directory.find(pages[usable], wanted, &host[usable])) break;
      words[usable] = counters.word_of(pages[usable].page());
      __builtin_prefetch(words[usable], /*rw=*/1);
    }
    if (usable == pages.size()) [[likely]] {
      uint64_t missed = 0;
      for (size_t i = 0; i < pages.size(); ++i) {
        if (!PageCounters::Near::TryAddOne(words[i], pages[i].page())) [[unlikely]] {
          missed |= uint64_t{1} << i;
        }
      }
      const size_t hits = pages.size() - CountBits(missed);
      if (hits != 0) CountPinLocked(hits);
      *misses = missed;
      return {};
    }
  }
  for (const Iova page : pages) {
    const auto whole = IovaRange::FromFirstAndLast(page, page).page_expanded();
    MVGPU_RETURN_IF_ERROR(domain_.check(whole, access));
  }
  *misses = LowestBits(pages.size());  // mapped meanwhile, or far away
  return {};
}

Result<void> PinContext::unpin_pages(std::span<const Iova> pages, Access access) {
  if (pages.size() == 1 && TryUnpinPage(pages.front(), access)) return {};
  return UnpinBatches(pages, access);
}

Result<void> PinContext::UnpinBatches(std::span<const Iova> pages, Access access) {
  for (size_t done = 0; done < pages.size();) {
    const auto batch = pages.subspan(done, std::min(kBatch, pages.size() - done));
    uint64_t misses = 0;
    MVGPU_RETURN_IF_ERROR(UnpinHits(batch, access, &misses));
    ForEachBit(misses, [&](size_t i) {
      ReleaseRun({batch[i].page(), 1}, IsForWrite(access), PinCounts::Form::kDense);
    });
    done += batch.size();
  }
  return {};
}

// In two passes, as PinHits().
Result<void> PinContext::UnpinHits(std::span<const Iova> pages, Access access, uint64_t* misses) {
  SpinLockHold hold(lock_);
  const PageCounters& dense = CountsLocked(IsForWrite(access)).dense();
  const PageCounters::Near counters(dense);
  std::array<uint64_t*, kBatch> words;
  uint64_t address_bits = 0;
  for (size_t i = 0; i < pages.size(); ++i) {
    address_bits |= pages[i].value();
    words[i] = counters.word_of(pages[i].page());
    __builtin_prefetch(words[i], /*rw=*/1);
  }
  uint64_t missed = LowestBits(pages.size());
  if (Iova(address_bits).page() < PageCounters::kNearPages) [[likely]] {
    missed = 0;
    for (size_t i = 0; i < pages.size(); ++i) {
      if (!PageCounters::Near::TryRemoveOne(words[i], pages[i].page())) [[unlikely]] {
        missed |= uint64_t{1} << i;
      }
    }
  }
  if (missed != 0) [[unlikely]] {
    const auto unheld = FirstUnheld(dense, pages, missed);
    if (unheld) {
      ForEachBit(~missed & LowestBits(pages.size()),
                 [&](size_t i) { PageCounters::Near::TryAddOne(words[i], pages[i].page()); });
      return Fail(ErrorCode::kInvalid,
                  fmt::format("{}: {} releases iova {:#x}, which it does not hold", domain_.name(),
                              owner_->pin_owner_name(), unheld->value()));
    }
  }
  figures_.pinned_pages -= pages.size() - CountBits(missed);
  *misses = missed;
  return {};
}

}  // namespace mvgpu::domain
