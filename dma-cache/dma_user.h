#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/base/spin_lock.h"
#include "apionly-domain/pin/pin_counts.h"
#include "dma-cache/dma_mapping.h"
#include "dma-cache/page_map.h"
#include "dma-cache/recent_holds.h"
#include "dma-cache/revoked_holds.h"

namespace mvgpu::dma {

class DmaCache;

// A user of cached pages, as one thread holds them: counters of its own, so that what it does to
// pages that it holds already (a hit) meets no other user, and finds the device address in a table
// that it reads without a lock. One that works in several threads has a user for each.
//
// A hit takes this user's lock and no other; other threads take that one only for moments and never
// for a hit of theirs. The first hold of a page by this user, and its last release, take the
// cache's lock: where somebody else holds the page or it is idle, for bookkeeping alone; otherwise
// with the system calls of a pin and the calls of the mapper.
//
// Epochs. Each revocation of pages that this user holds begins a new epoch. Who holds something
// remembers the epoch in which it was taken (handles do so themselves). A release in the same epoch
// is a matter of counts; one in a later epoch first looks which of its pages were revoked since,
// and lets go of the others only. So a late release harms nothing that was mapped anew.
//
// Thread-safe; meant for one thread at a time. Lock order: the cache's lock, then this one.
class alignas(64) DmaUser {
 public:
  class Owner {
   public:
    virtual ~Owner() = default;
    // Pages in the range are about to lose their device addresses: take them out of the hardware
    // before this returns. Told once for each revocation, if this user holds any of the pages then.
    // Holds may be given up here or later, which does not matter: after this they hold nothing. New
    // ones in the range fail with kBusy until the revocation is done. Called without locks of the
    // cache, from the thread that revokes. Must not close a user or call DmaCache::recheck().
    virtual void on_revoke(IovaRange range) = 0;
  };

  static constexpr size_t kBatch = 64;  // single pages that are looked at together

  // REQUIRES: all holds of this user were given up; not under a lock that on_revoke() takes.
  ~DmaUser();
  DmaUser(const DmaUser&) = delete;
  DmaUser& operator=(const DmaUser&) = delete;

  // Holds every page that the range touches; all of it or nothing. Errors: those of
  // PinContext::pin() and Mapper::map(); kBusy where a revocation is under way.
  Result<DmaMapping> map(IovaRange range, Direction direction);
  // The same with one device address for all of it. Also kNotContiguous: the device sees the pages
  // at scattered addresses, map them one by one. Nothing is cached then that was not before.
  Result<DmaMapping> map_contiguous(IovaRange range, Direction direction);

  // The same for single pages, each the page of one address, without a handle; in any order, the
  // same one several times if so wished. All of them or none. addresses[i] is what the device sees
  // at pages[i]. Returns the epoch that belongs to these holds. REQUIRES: as many addresses as
  // pages.
  Result<uint64_t> map_pages(std::span<const Iova> pages, Direction direction,
                             std::span<DmaAddr> addresses);
  // Gives holds up that map_pages() returned with this epoch, in any order and in parts; direction
  // as then. kInvalid when this user does not hold one of the pages: those before it in `pages`,
  // and some of the 64 around it, are released.
  Result<void> unmap_pages(std::span<const Iova> pages, Direction direction, uint64_t epoch);

 private:
  friend class DmaCache;
  friend class DmaMapping;

  using Table = PageMap<FlatLeaves>;
  using Counters = domain::PageCounters;
  using Form = domain::PinCounts::Form;

  struct Figures {
    uint64_t map_calls = 0;  // ranges and batches that succeeded
    uint64_t hit_pages = 0;  // of them, pages that were cached
  };
  // At most kBatch pages.
  struct Batch {
    std::span<const Iova> pages;
    Direction direction;
    std::span<DmaAddr> addresses;
  };

  DmaUser(DmaCache* cache, const Table* table, const domain::ApiOnlyDomain* domain, Owner* owner)
      : cache_(*cache), table_(*table), domain_(*domain), owner_(owner) {}

  const domain::ApiOnlyDomain& domain() const { return domain_; }
  static uint64_t WantedFlags(domain::Access access) {
    return static_cast<uint64_t>(access) * Table::kRead;
  }
  static bool IsUsable(uint64_t flags, uint64_t wanted) {
    return (flags & (wanted | Table::kGoing)) == wanted;
  }
  domain::PinCounts& CountsLocked(bool for_write) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_) {
    return counts_[for_write ? 1 : 0];
  }
  RecentHolds& RecentLocked(bool for_write) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_) {
    return recent_[for_write ? 1 : 0];
  }

  Result<DmaMapping> Map(IovaRange range, Direction direction, bool contiguous);
  // The whole of it if that is a hit; otherwise false, and nothing is held.
  bool TryMap(PageRun pages, Direction direction, DmaMapping* mapping);
  // Runs of the device behind the pages. False: some page is not usable in that way.
  template <typename Find>
  static bool AppendRuns(PageRun pages, uint64_t wanted, const Find& find, MappedRuns* runs);
  // Counts what is a hit; bit i of *misses: pages[i] is still to be done. False: the epoch is not
  // `epoch` any more, and nothing is held.
  bool MapHits(const Batch& batch, std::optional<uint64_t>* epoch, uint64_t* misses);
  // All of the batch, or nothing; false where the epoch ended.
  Result<bool> MapBatch(const Batch& batch, std::optional<uint64_t>* epoch);
  Result<bool> TryMapPages(std::span<const Iova> pages, Direction direction,
                           std::span<DmaAddr> addresses, std::optional<uint64_t>* epoch);
  uint64_t UnmapHits(std::span<const Iova> pages, bool for_write, uint64_t epoch);
  // Hits on pages of a batch that were not mapped lately, and on those of them for which there is
  // no room: the pages named by the bits. Return those that are none.
  uint64_t AddToOthers(const Batch& batch, uint64_t others) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  // These pages of the batch are held in the counters, with the batch's hold: that goes to the
  // recent ones.
  void EnterLocked(const Batch& batch, uint64_t pages) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  uint64_t RemoveFromOthers(std::span<const Iova> pages, bool for_write, uint64_t others)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  uint64_t AddToMany(const Batch& batch, uint64_t pages) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  uint64_t RemoveFromMany(std::span<const Iova> batch, bool for_write, uint64_t pages)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);

  void Release(PageRun pages, bool for_write, uint64_t epoch);
  bool IsValid(PageRun pages, uint64_t epoch);

  // What the cache does, with its lock held.
  // Adds a hold of each page. Returns the epoch.
  uint64_t AddHolds(std::span<const PageRun> pages, bool for_write, const Figures& figures);
  uint64_t epoch();
  // Takes one hold of each page away, where that is still one; appends what this user does not hold
  // for this kind any more. False: something is not held at all, and what is behind it was left.
  bool RemoveHolds(std::span<const PageRun> pages, bool for_write, uint64_t epoch,
                   std::vector<PageRun>* freed);
  void AppendUnheld(const std::vector<PageRun>& pages, bool for_write,
                    std::vector<PageRun>* unheld);
  // From now on each hit of these pages looks into the table. Whether any of them is held.
  bool SettleAll(PageRun pages);
  void SettleLocked(PageRun pages, bool for_write) ABSL_EXCLUSIVE_LOCKS_REQUIRED(lock_);
  // All holds of these pages are void. Begins a new epoch if there were any.
  void Forget(std::span<const PageRun> pages);
  bool IsEmpty();
  Figures figures();

  DmaCache& cache_;                      // outlives its users: checked in its destructor
  const Table& table_;                   // the cache's
  const domain::ApiOnlyDomain& domain_;  // outlives the cache
  Owner* const owner_;                   // outlives the user: contract of DmaCache::open_user()
  SpinLock lock_;
  std::array<domain::PinCounts, 2> counts_ ABSL_GUARDED_BY(lock_);  // holds for reading, writing,
  std::array<RecentHolds, 2> recent_ ABSL_GUARDED_BY(lock_);        // and some more of the same
  uint64_t epoch_ ABSL_GUARDED_BY(lock_) = 0;
  RevokedHolds revoked_ ABSL_GUARDED_BY(lock_);
  std::vector<PageRun> real_ ABSL_GUARDED_BY(lock_);  // kept, so that releases allocate nothing
  Figures figures_ ABSL_GUARDED_BY(lock_);
};

template <typename Find>
bool DmaUser::AppendRuns(PageRun pages, uint64_t wanted, const Find& find, MappedRuns* runs) {
  PageRun run{pages.first, 0};
  uint64_t target = 0;  // of the run's first page
  const auto append = [&] {
    if (run.count != 0) runs->push_back({RangeOf(run), DmaAddr(BytesIn(target))});
  };
  for (uint64_t page = pages.first; page < pages.end();) {
    const Table::Found found = find(page);
    if (!IsUsable(found.flags(), wanted)) return false;
    const uint64_t count = std::min(found.left, pages.end() - page);
    if (run.count == 0 || target + run.count != found.target()) {
      append();
      run = {page, 0};
      target = found.target();
    }
    run.count += count;
    page += count;
  }
  append();
  return true;
}

}  // namespace mvgpu::dma
