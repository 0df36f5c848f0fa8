#pragma once

// The cache from guest page to dma_addr_t: "cache GPA to whatever dma_addr_t is returned by
// dma_map_page" (K. Tian, qemu-devel, May 2016), with the pin that keeps the page there.
//
//   hold      DmaUser::map(). Pages that the user holds already are hits and cost a count. Pages
//             that others hold, or that are idle, are hits too, with some bookkeeping. The gaps are
//             pinned in the domain and given to the mapper, gap by gap, whatever sizes were asked
//             for before: a 4 KiB page inside a cached 2 MiB is a hit, 2 MiB over cached pages map
//             the rest.
//   release   The last user of a page unmaps it from the device, then lets go of its pin; or the
//             page becomes idle: it stays pinned and mapped, until it is used again or is the
//             oldest of too many. Idle pages go first when a limit is met.
//   revoke    The VMM takes the memory away, or it moved (recheck()): no new holds there; users are
//             told and take the addresses out of the hardware; then device mapping, flush, pin, in
//             this order. What users still hold there is void, see DmaUser.
//
// Invariants
//   - A page is cached iff some user holds it or it is idle, or its revocation is under way. The
//     mapper maps it once in that time.
//   - A cached page has a pin for writing iff some user holds it for writing, and one for reading
//     iff some user holds it for reading or it is idle.
//   - Which pages a user holds (not how often) changes only under the cache's lock.
//
// Where to read next: mapper.h (what stands in for dma_map_page), dma_user.h (hits), holds.cc
// (misses), releases.cc, revocation.cc, page_map.h and reverse_map.h (the tables).

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/base/mutex.h"
#include "dma-cache/dma_mapping.h"
#include "dma-cache/dma_user.h"
#include "dma-cache/idle_list.h"
#include "dma-cache/mapper.h"
#include "dma-cache/page_map.h"
#include "dma-cache/reverse_map.h"

namespace mvgpu::dma {

// Thread-safe. Lock order: the container's change lock, the revocation lock (users are called under
// these two), the cache's lock, then a user's lock or the domain's locks.
class DmaCache final : public domain::PinOwner {
 public:
  struct Options {
    uint64_t idle_limit_pages = 0;  // 0: what nobody holds goes at once
  };
  struct Counters {
    uint64_t map_calls = 0;       // ranges and batches that users asked for, and got
    uint64_t hit_pages = 0;       // pages of them that were there already
    uint64_t miss_pages = 0;      // pages that were pinned and mapped
    uint64_t mapper_calls = 0;    // to map, successful ones
    uint64_t unmapped_pages = 0;  // pages given back to the mapper, for whatever reason
    uint64_t revocations = 0;     // users told
    uint64_t revoked_pages = 0;   // cached pages that were taken away
    uint64_t evicted_pages = 0;   // idle pages that went for others
    uint64_t cached_pages = 0;    // now, idle ones included
    uint64_t idle_pages = 0;      // now

    uint64_t cached_bytes() const { return BytesIn(cached_pages); }
    uint64_t idle_bytes() const { return BytesIn(idle_pages); }
  };

  // Both must outlive the cache.
  DmaCache(domain::ApiOnlyDomain* domain, Mapper* mapper) : DmaCache(domain, mapper, Options{}) {}
  DmaCache(domain::ApiOnlyDomain* domain, Mapper* mapper, Options options);
  // REQUIRES: all users are closed.
  ~DmaCache() override;

  // A way to hold pages for this owner, which must outlive it. Must not outlive the cache.
  std::unique_ptr<DmaUser> open_user(DmaUser::Owner* owner);

  // What the device sees at an IOVA now; nothing where it is not cached, or about to be revoked. It
  // stays true as long as the caller holds the page.
  std::optional<DmaAddr> address_of(Iova iova) const;
  // The IOVAs that have this device address, in no order; several where the VMM shows a page of
  // memory several times and the mapper gave the same address. Without those about to be revoked.
  std::vector<Iova> iovas_of(DmaAddr address) const;

  // Asks the mapper whether what is cached is still where it was, and revokes what moved. Returns
  // the number of these pages. Not from inside DmaUser::Owner::on_revoke().
  uint64_t recheck();

  Counters counters() const;
  Mapper::Figures mapper_figures() const;

  std::string_view pin_owner_name() const override { return "dma-cache"; }
  void on_revoke(IovaRange range) override;

 private:
  friend class DmaUser;

  using Table = PageMap<FlatLeaves>;
  using Extent = Table::Extent;
  struct Held {
    uint64_t epoch = 0;
    MappedRuns runs;
  };
  // What a request has to do; each of the three is done as a whole or not at all.
  struct Plan {
    std::vector<PageRun> gaps;      // to be pinned and mapped
    std::vector<PageRun> upgrades;  // cached, but not pinned for this kind of access
    std::vector<PageRun> idle;      // taken out of the idle list
  };
  // What the mapper is asked for in one call: where its runs end, and its answer.
  struct Request {
    uint64_t pages;
    domain::Access access;
    bool apart;  // each run for itself
    size_t runs_end;
    size_t answer_end = 0;
  };

  static Error NotContiguousError(PageRun pages);
  static uint64_t PinnedFlag(bool for_write) {
    return for_write ? Table::kPinnedWrite : Table::kPinnedRead;
  }
  static uint64_t AsRunsFlag(bool for_write) {
    return for_write ? Table::kWriteAsRuns : Table::kReadAsRuns;
  }

  // holds.cc. All of what a user asks for, or nothing.
  Result<Held> HoldRange(DmaUser* user, PageRun pages, Direction direction, bool contiguous);
  // The pages of the batch named by `misses`; false when the user is not in this epoch any more.
  Result<bool> HoldPages(DmaUser* user, const DmaUser::Batch& batch, uint64_t misses,
                         uint64_t epoch);
  // Makes every page cached and pinned for this kind of access; the number of pages that were not
  // cached before. Somebody has to hold them before the lock goes. REQUIRES: the runs are in
  // ascending order, and apart; one if `contiguous`.
  Result<uint64_t> HoldLocked(std::span<const PageRun> pages, Direction direction, bool contiguous)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  Result<void> MakePlanLocked(std::span<const PageRun> pages, Direction direction)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void PlanRunLocked(PageRun pages, uint64_t wanted, uint64_t pinned, bool* usable)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  Result<void> CarryOutLocked(Direction direction) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Whether those of the pages that are cached may be parts of one stretch of device addresses.
  bool IsContiguousLocked(PageRun pages) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  Result<void> FillGapsLocked(Direction direction) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // `pinned` are the runs of all gaps, in their order.
  void MakeRequestsLocked(std::span<const domain::PinnedRun> pinned)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // For the pages, which are the first of those in `*pinned`; takes them out of there.
  void AddRequestLocked(PageRun pages, domain::Access access,
                        std::span<const domain::PinnedRun>* pinned)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // The same for what is one run.
  void AddRunLocked(const domain::PinnedRun& run, uint64_t pages, domain::Access access)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  Result<void> AskMapperLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  Result<void> AskMapperLocked(Request* request, std::span<const domain::PinnedRun> runs)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void EnterAnswersLocked(uint64_t pinned) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  Result<domain::PinnedRange> PinLocked(std::span<const PageRun> pages, domain::Access access)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  // releases.cc
  bool Release(DmaUser* user, std::span<const PageRun> pages, bool for_write, uint64_t epoch);
  bool ReleaseLocked(DmaUser* user, std::span<const PageRun> pages, bool for_write, uint64_t epoch)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Pages that the user does not hold for this kind any more.
  void LetGoLocked(const DmaUser* by, std::vector<PageRun>* pages, bool for_write)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void AppendExtents(PageRun pages, std::vector<Extent>* extents) const
      ABSL_SHARED_LOCKS_REQUIRED(mutex_);
  // Whether it may stay without users; it has the pin that idle pages have then. REQUIRES: pages
  // may be idle here.
  bool KeepIdleLocked(const Extent& extent) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void UnpinLocked(std::span<const Extent> extents, bool for_write)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Takes the pin for this kind away from pages that stay cached.
  void DropPinLocked(PageRun pages, bool for_write) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Takes what is cached of these pages away from the device, then their pins.
  void DropLocked(std::span<const PageRun> pages) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void DropExtentsLocked(std::span<const Extent> extents) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // False: nothing is idle.
  bool EvictLocked(uint64_t pages) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void ReclaimLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  // revocation.cc
  void Revoke(IovaRange range);
  void AppendMovedLocked(const Extent& extent, std::vector<PageRun>* moved)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void AppendMovedPagesLocked(const domain::PinnedRun& run, DmaAddr address,
                              std::vector<PageRun>* moved) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void CloseUser(DmaUser* user);

  domain::ApiOnlyDomain* const domain_;
  const std::unique_ptr<domain::PinContext> pins_;  // used with mutex_ held
  Mapper* const mapper_;
  const Options options_;

  Mutex revoke_mutex_;  // one revocation at a time; users stay open meanwhile
  mutable Mutex mutex_;
  Table table_;  // written with mutex_ held; read with it, or under a user's lock by that user
  ReverseMap reverse_ ABSL_GUARDED_BY(mutex_);
  IdleList idle_ ABSL_GUARDED_BY(mutex_);
  std::vector<DmaUser*> users_ ABSL_GUARDED_BY(mutex_);
  Counters counters_ ABSL_GUARDED_BY(mutex_);  // without what users count; of closed users, that
  // What misses and releases work with; kept, so that they allocate nothing.
  Plan plan_ ABSL_GUARDED_BY(mutex_);
  struct {
    std::vector<Request> requests;
    std::vector<domain::PinnedRun> runs;
    std::vector<MappedRun> mapped;
    std::vector<PageRun> freed;
    std::vector<PageRun> rest;
    std::vector<PageRun> idle;
    std::vector<Extent> released;
    std::vector<Extent> dropped;
    std::vector<PageRun> unpinned;
  } scratch_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace mvgpu::dma
