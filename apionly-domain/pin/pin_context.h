#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "apionly-domain/access.h"
#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/base/spin_lock.h"
#include "apionly-domain/pin/pin_counts.h"
#include "apionly-domain/pin/pinned_range.h"
#include "apionly-domain/translation/page_directory.h"

namespace mvgpu::domain {

class ApiOnlyDomain;

// Somebody who pins. Only its own contexts can release its pins.
class PinOwner {
 public:
  virtual ~PinOwner() = default;
  virtual std::string_view pin_owner_name() const = 0;
  // The mappings in the range are about to go, and this owner has pins there. Told once for each
  // unmap. It releases them now or, from any thread, before the domain's unmap deadline; otherwise
  // the unmap is refused in its name. Called without locks of the domain: releasing is allowed
  // here, and new pins in the range fail with kBusy until the unmap is done.
  virtual void on_revoke(IovaRange range) = 0;
};

// An owner's pins, as one thread takes them: counters of its own, so that what it does to pages
// that it holds already (a hit) meets no other context. An owner that pins from several threads has
// a context for each; handles may be released by any thread.
//
// A hit takes this context's lock and no other; other threads take that one only for moments and
// never for a hit of theirs (an unmap that looks for holders, somebody else's miss, a report, the
// release of a handle that was given away). A miss (the first pin of a page by this context, or the
// last release) takes the domain's pin lock, and the system calls and accounts happen under that.
//
// Thread-safe; meant for one thread at a time. Lock order: the domain's pin lock, then this one.
class alignas(64) PinContext {
 public:
  // REQUIRES: all pins of this context are released.
  ~PinContext();
  PinContext(const PinContext&) = delete;
  PinContext& operator=(const PinContext&) = delete;

  // Pins every page that the range touches, over any number of adjacent mappings, of any size; all
  // of it or nothing. A pin for write is one with Access::kWrite or kReadWrite: it marks its pages
  // dirty, in each round that it lives to see and when it ends. Errors: kNotMapped (a hole),
  // kPermission, kNotReachable (no file), kBusy (about to be unmapped), kLimit, kTruncated,
  // kSystem.
  Result<PinnedRange> pin(IovaRange range, Access access);

  // The same for single pages, each the page of one address, without a handle; in any order, the
  // same one several times if so wished. All of them or none. host[i] is what the host sees at
  // pages[i]; REQUIRES: host.size() == pages.size().
  Result<void> pin_pages(std::span<const Iova> pages, Access access, std::span<std::byte*> host);
  // Lets go of pages that pin_pages() pinned for the same kind of access. kInvalid when this
  // context does not hold one of them that often: of the 64 pages around it none is released, those
  // before are.
  Result<void> unpin_pages(std::span<const Iova> pages, Access access);

  // The same as pin() for several runs of pages, all of them or none, at the cost of one miss: for
  // who knows that they are misses. REQUIRES: they are in ascending order, and apart.
  Result<PinnedRange> pin_misses(std::span<const PageRun> pages, Access access);

  // The same for one run, without a handle: for who has books of its own. release_last() or
  // release_kept() lets go, as a whole or in any parts, with PinCounts::FormFor(pages.count).
  Result<void> pin_kept(PageRun pages, Access access);

  // Lets go of pages of which the handle was given up. REQUIRES: this context pinned them for this
  // kind of access, and PinnedRange::keep() said `form`.
  void release_kept(PageRun pages, Access access, PinCounts::Form form) {
    ReleaseRun(pages, IsForWrite(access), form);
  }
  // The same for several runs that nobody holds afterwards as a rule, at the cost of one release.
  void release_last(std::span<const PageRun> pages, Access access, PinCounts::Form form);

  // Asks for what a pin of the page looks at first: for who is about to pin many pages one by one.
  // Inline: the compiler sees no effect in a call of a function that only prefetches, and leaves it
  // out.
  [[gnu::always_inline]] void prefetch(Iova page, Access access) const {
    PrefetchCounter(page.page(), IsForWrite(access));
  }

  PinOwner* owner() const { return owner_; }

 private:
  friend class ApiOnlyDomain;
  friend class PinnedRange;

  // Since the context was made, and now. Sums over pages: a page pinned twice counts twice.
  struct Figures {
    uint64_t pin_calls = 0;     // ranges, batches, and single pages of a batch that were misses
    uint64_t pages_pinned = 0;  // by them; neither counts what was refused half-way
    uint64_t pinned_pages = 0;  // now
  };
  static constexpr size_t kBatch = 64;

  PinContext(ApiOnlyDomain* domain, PinOwner* owner) : domain_(*domain), owner_(owner) {}

  static bool IsForWrite(Access access) { return Allows(access, Access::kWrite); }
  PinCounts& CountsLocked(bool for_write) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_) {
    return counts_[for_write ? 1 : 0];
  }
  void CountPinLocked(uint64_t pages) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_) {
    ++figures_.pin_calls;
    figures_.pages_pinned += pages;
    figures_.pinned_pages += pages;
  }
  // Takes calls out of the figures that succeeded before one of the same batch was refused.
  void ForgetPins(uint64_t calls, uint64_t pages);
  // So that a hit does not wait for its counter with the lock held: a locked instruction holds up
  // every load behind it.
  [[gnu::always_inline]] void PrefetchCounter(uint64_t page,
                                              bool for_write) const ABSL_NO_THREAD_SAFETY_ANALYSIS {
    PageCounters::Near(counts_[for_write ? 1 : 0].dense()).prefetch(page);
  }
  // Hits that one look decides, see pin_context.cc. False, and nothing is changed, when it may be a
  // miss or takes more than that.
  bool TryPin(IovaRange pages, Access access, PinnedRange* pinned);
  bool TryReleaseRun(PageRun run, bool for_write, PinCounts::Form form);
  bool TryPinPage(Iova page, Access access, std::byte** host);
  bool TryUnpinPage(Iova page, Access access);
  // Everything else.
  [[gnu::noinline]] void PinSlowly(IovaRange pages, Access access, Result<PinnedRange>* pinned);
  [[gnu::noinline]] void ReleaseSlowly(PageRun run, bool for_write, PinCounts::Form form);
  [[gnu::noinline]] Result<void> PinBatches(std::span<const Iova> pages, Access access,
                                            std::span<std::byte*> host);
  [[gnu::noinline]] Result<void> UnpinBatches(std::span<const Iova> pages, Access access);
  // The whole pin of a range if that is a hit, however often its pages are held and in how many
  // pieces; otherwise false, and nothing is pinned.
  bool TryPinPieces(IovaRange pages, Access access, PinCounts::Form form, PinnedRuns* runs);
  // For at most kBatch pages. Bit i of *misses: pages[i] was no hit and is still to be done.
  Result<void> PinHits(std::span<const Iova> pages, Access access, std::span<std::byte*> host,
                       uint64_t* misses);
  Result<void> UnpinHits(std::span<const Iova> pages, Access access, uint64_t* misses);
  // All of at most kBatch pages, or none. Adds to *calls by how much Figures::pin_calls grew.
  Result<void> PinBatch(std::span<const Iova> pages, Access access, std::span<std::byte*> host,
                        uint64_t* calls);
  void ReleaseRun(PageRun run, bool for_write, PinCounts::Form form);

  ApiOnlyDomain& domain_;  // outlives its contexts: checked in its destructor
  PinOwner* const owner_;  // outlives its contexts: contract of ApiOnlyDomain::open_context()
  SpinLock lock_;
  std::array<PinCounts, 2> counts_ ABSL_GUARDED_BY(lock_);  // pins for read, for write
  Figures figures_ ABSL_GUARDED_BY(lock_);
};

}  // namespace mvgpu::domain
