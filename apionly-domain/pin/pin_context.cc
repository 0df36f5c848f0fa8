#include "apionly-domain/pin/pin_context.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <optional>

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/base/check.h"

namespace mvgpu::domain {

namespace {

// Calls visit(index) for each bit that is set.
template <typename Visit>
void ForEachBit(uint64_t bits, Visit visit) {
  for (; bits != 0; bits &= bits - 1) visit(static_cast<size_t>(std::countr_zero(bits)));
}

uint64_t MaskOf(size_t count) { return count == 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

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

Result<PinnedRange> PinContext::pin(IovaRange range, Access access) {
  const IovaRange pages = range.page_expanded();
  const auto form = PinCounts::FormFor(PagesOf(pages).count);
  Result<PinnedRange> pinned;  // filled where it is: moving one costs as much as a hit
  pinned->context_ = this;
  pinned->for_write_ = IsForWrite(access);
  pinned->form_ = form;
  if (!TryPin(pages, access, form, &pinned->runs_)) [[unlikely]] {
    PinnedRuns runs;  // in the handle only when they are pinned
    MVGPU_RETURN_IF_ERROR(domain_.PinMiss(this, pages, access, form, &runs));
    pinned->runs_ = std::move(runs);
  }
  return pinned;
}

bool PinContext::TryPin(IovaRange pages, Access access, PinCounts::Form form, PinnedRuns* runs) {
  const auto wanted = static_cast<uint64_t>(access);
  SpinLockHold hold(lock_);
  bool usable = true;
  const PageDirectory::Found found = domain_.directory_.find(pages.start());
  if (PageDirectory::IsUsable(found.flags, wanted) && pages.last() - pages.start() < found.left)
      [[likely]] {
    runs->push_back({pages, found.host});
  } else {
    usable = !domain_.directory_.walk(pages, wanted, [runs](auto extent) {
      runs->push_back({extent.iova, extent.host});
    });
  }
  if (!usable || !CountsLocked(IsForWrite(access)).try_add(PagesOf(pages), form)) {
    runs->clear();  // they are not pinned
    return false;
  }
  CountPinLocked(PagesOf(pages).count);
  return true;
}

void PinContext::release(std::span<const PinnedRun> runs, bool for_write, PinCounts::Form form) {
  for (const PinnedRun& run : runs) ReleaseRun(run.iova_pages(), for_write, form);
}

void PinContext::ReleaseRun(PageRun run, bool for_write, PinCounts::Form form) {
  {
    SpinLockHold hold(lock_);
    if (CountsLocked(for_write).try_remove(run, form)) {
      figures_.pinned_pages -= run.count;
      return;
    }
  }
  domain_.ReleaseMiss(this, run, for_write, form);
}

Result<void> PinContext::pin_pages(std::span<const Iova> pages, Access access,
                                   std::span<std::byte*> host) {
  MVGPU_DCHECK(pages.size() == host.size());
  if (pages.size() == 1 && TryPinPage(pages.front(), access, &host.front())) return {};
  for (size_t done = 0; done < pages.size();) {
    const size_t count = std::min(kBatch, pages.size() - done);
    auto pinned = PinBatch(pages.subspan(done, count), access, host.subspan(done, count));
    if (!pinned) [[unlikely]] {
      MVGPU_CHECK(unpin_pages(pages.first(done), access).has_value());
      return pinned;
    }
    done += count;
  }
  return {};
}

Result<void> PinContext::PinBatch(std::span<const Iova> pages, Access access,
                                  std::span<std::byte*> host) {
  uint64_t misses = 0;
  MVGPU_RETURN_IF_ERROR(PinHits(pages, access, host, &misses));
  Result<void> outcome;
  uint64_t undone = misses;
  ForEachBit(misses, [&](size_t i) {
    if (!outcome) return;
    auto pinned = pin(IovaRange::FromFirstAndLast(pages[i], pages[i]), access);
    if (!pinned) {
      outcome = tl::unexpected<Error>(std::move(pinned).error());
      return;
    }
    undone &= undone - 1;
    host[i] = pinned->runs().front().host + pages[i].offset_in_page();
    pinned->runs_.clear();  // the page stays pinned, without the handle
  });
  if (outcome) return outcome;
  for (size_t i = 0; i < pages.size(); ++i) {
    if ((undone >> i & 1) != 0) continue;
    ReleaseRun({pages[i].page(), 1}, IsForWrite(access), PinCounts::Form::kDense);
  }
  return outcome;
}

// What the batch does, without its arrays: half the time for a page alone.
bool PinContext::TryPinPage(Iova page, Access access, std::byte** host) {
  SpinLockHold hold(lock_);
  const PageDirectory::Found found = domain_.directory_.find(page);
  uint64_t* word = CountsLocked(IsForWrite(access)).dense().find(page.page());
  if (!PageDirectory::IsUsable(found.flags, static_cast<uint64_t>(access)) || word == nullptr ||
      !PageCounters::TryAddOne(word, page.page())) {
    return false;
  }
  *host = found.host;
  CountPinLocked(1);
  return true;
}

bool PinContext::TryUnpinPage(Iova page, Access access) {
  SpinLockHold hold(lock_);
  uint64_t* word = CountsLocked(IsForWrite(access)).dense().find(page.page());
  if (word == nullptr || !PageCounters::TryRemoveOne(word, page.page())) return false;
  --figures_.pinned_pages;
  return true;
}

// In two passes: the first looks translations up and asks for the counters, which lie anywhere in
// 4 MiB for 64 GiB of memory; by the time of the second they are there. A pass that did both would
// wait for each.
Result<void> PinContext::PinHits(std::span<const Iova> pages, Access access,
                                 std::span<std::byte*> host, uint64_t* misses) {
  const auto wanted = static_cast<uint64_t>(access);
  std::array<uint64_t*, kBatch> words;
  std::array<std::byte*, kBatch> hosts;
  uint64_t missed = 0;
  {
    SpinLockHold hold(lock_);
    PageCounters& counters = CountsLocked(IsForWrite(access)).dense();
    // Writes to nothing but arrays of its own: so the compiler keeps the rest in registers.
    bool usable = true;
    for (size_t i = 0; i < pages.size(); ++i) {
      const PageDirectory::Found found = domain_.directory_.find_near(pages[i]);
      usable &= PageDirectory::IsUsable(found.flags, wanted);
      hosts[i] = found.host;
      words[i] = counters.find_near(pages[i].page());
      __builtin_prefetch(words[i], /*rw=*/1);
    }
    if (usable) [[likely]] {
      for (size_t i = 0; i < pages.size(); ++i) {
        host[i] = hosts[i];
        const bool hit = words[i] != nullptr && PageCounters::TryAddOne(words[i], pages[i].page());
        if (!hit) [[unlikely]] {
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
  *misses = MaskOf(pages.size());  // mapped meanwhile, or far away
  return {};
}

Result<void> PinContext::unpin_pages(std::span<const Iova> pages, Access access) {
  if (pages.size() == 1 && TryUnpinPage(pages.front(), access)) return {};
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

Result<void> PinContext::UnpinHits(std::span<const Iova> pages, Access access, uint64_t* misses) {
  {
    SpinLockHold hold(lock_);
    PageCounters& counters = CountsLocked(IsForWrite(access)).dense();
    std::array<uint64_t*, kBatch> words;
    for (size_t i = 0; i < pages.size(); ++i) {
      words[i] = counters.find_near(pages[i].page());
      __builtin_prefetch(words[i], /*rw=*/1);
    }
    uint64_t missed = 0;
    for (size_t i = 0; i < pages.size(); ++i) {
      const bool hit = words[i] != nullptr && PageCounters::TryRemoveOne(words[i], pages[i].page());
      if (!hit) [[unlikely]] {
        missed |= uint64_t{1} << i;
      }
    }
    if (missed != 0) {
      const auto unheld = FirstUnheld(counters, pages, missed);
      if (unheld) {
        ForEachBit(~missed & MaskOf(pages.size()),
                   [&](size_t i) { PageCounters::TryAddOne(words[i], pages[i].page()); });
        return Fail(ErrorCode::kInvalid,
                    fmt::format("{}: {} releases iova {:#x}, which it does not hold",
                                domain_.name(), owner_->pin_owner_name(), unheld->value()));
      }
    }
    figures_.pinned_pages -= pages.size() - CountBits(missed);
    *misses = missed;
  }
  return {};
}

}  // namespace mvgpu::domain
