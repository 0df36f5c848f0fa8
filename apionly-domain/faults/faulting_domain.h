#pragma once

// I/O page fault mode: a domain that pins nothing when the VMM maps. A fault of the device pins the
// page, and those around it that are not there yet, and shows them to the device; what the device
// does not use goes again. (The idea of "Add IO page fault support for VFIO", January 2021; like
// its third version this one forgets pages when memory is given back.)
//
// Invariants
//   - A page's bit is set iff it is pinned by this domain and mapped in the target. To map is pin,
//     then target; to unmap is target, flush, then unpin: the device never reaches what is not
//     pinned.
//   - Never more than Options::max_pinned_pages are pinned. Who needs room takes it from the pages
//     that were not used for longest, by a clock over all pages; neighbours that came with a fault
//     and were not used yet go first.
//   - While a range is on its way out (an Invalidation, an unmap by the VMM), faults in it change
//     nothing and are to be tried again; when begin_invalidate() returns, nothing there is mapped
//     or pinned. So no fault brings back what is being given back.
//   - A fault of a page that is mapped already is one that another fault answered, or one whose
//     mapping the IOMMU lost; then it is mapped anew.
//
// Pages are mapped with the rights of the VMM's mapping, so a page never has to be mapped again for
// a write; a page of a writable mapping counts as dirty while it is there.
//
// Attach it to the guest's container after the ApiOnlyDomain that it pins with. Faults in different
// blocks of 2 MiB do not wait for each other here; the pin lock of the ApiOnlyDomain is one.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <absl/container/btree_map.h>

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/assigned/device_target.h"
#include "apionly-domain/base/mutex.h"
#include "apionly-domain/base/spin_lock.h"
#include "apionly-domain/domain.h"
#include "apionly-domain/faults/fault_times.h"
#include "apionly-domain/faults/page_bits.h"

namespace mvgpu::domain {

// Thread-safe. Lock order: the container's change lock, the clock's lock, a block's lock, then the
// pin lock or what the target locks. The locks of blocks and of mappings are for moments, and
// nothing is locked under them.
class FaultingDomain final : public Domain, public PinOwner {
 public:
  static constexpr uint64_t kBlockPages = PageBits::kPages;
  struct Options {
    std::string name = "faulting";
    // How many pages one fault may bring: a power of two up to kBlockPages. The window around the
    // fault is aligned to it.
    uint64_t around_pages = 1;
    uint64_t max_pinned_pages = UINT64_MAX;  // at least 1
  };
  struct Parts {  // all outlive the domain
    ApiOnlyDomain* guest;
    DeviceTarget* target;
    FaultTimes* times;  // may be null
  };
  enum class Outcome : uint8_t {
    kMapped,
    kThere,  // it was mapped already
    kRetry,  // it is about to be unmapped, or others are faster: the device is to try again
  };
  struct Resolved {
    Outcome outcome;
    uint64_t pages = 0;  // that were mapped
  };
  struct Counters {
    uint64_t mapped_pages = 0;  // bits that are set
    uint64_t pinned_pages = 0;  // for faults under way too
    uint64_t peak_pinned_pages = 0;
    uint64_t blocks = 0;  // that it remembers pages of: 2 MiB each, 350 bytes or so
    uint64_t faults = 0;
    uint64_t pages_mapped = 0;       // by them, since creation
    uint64_t already_there = 0;      // faults
    uint64_t retries = 0;            // faults that ended so
    uint64_t failures = 0;           // faults that ended with an error
    uint64_t evicted_pages = 0;      // by the clock
    uint64_t invalidated_pages = 0;  // given back
    uint64_t revoked_pages = 0;      // taken away by the VMM
  };

  FaultingDomain(Options options, Parts parts);
  // REQUIRES: detached from its container, no Invalidation lives.
  ~FaultingDomain() override;

  // The device wanted to do this here. Errors: kNotMapped, kPermission, kNotReachable (no file),
  // kLimit (of pins, and no page can be dropped), those of PinContext::pin() and
  // DeviceTarget::map(); the access is not to be then.
  Result<Resolved> fault(Iova iova, Access access);

  // While it lives, nothing is mapped in its range. For who gives memory back (a hole in the file,
  // MADV_DONTNEED): begin, give back, end.
  class Invalidation {
   public:
    ~Invalidation();
    Invalidation(const Invalidation&) = delete;
    Invalidation& operator=(const Invalidation&) = delete;
    uint64_t pages() const { return pages_; }  // that were mapped

   private:
    friend class FaultingDomain;
    Invalidation(FaultingDomain* domain, IovaRange range);
    FaultingDomain& domain_;  // outlives this: contract of its destructor
    const IovaRange range_;
    const uint64_t pages_;
  };
  // Every page that the range touches.
  Invalidation begin_invalidate(IovaRange range) { return Invalidation(this, range); }
  // The same, begun and ended. Returns how many pages went.
  uint64_t invalidate(IovaRange range) { return begin_invalidate(range).pages(); }

  // Drops every page that was there all the time since the last call and was not used meanwhile, as
  // far as faults and the target's accessed flags tell. So what came since then stays, also the
  // neighbours of a fault: the device had no whole period yet in which it could have come to them.
  // Returns how many went.
  uint64_t drop_unused();

  bool is_mapped(Iova iova) const;
  Counters counters() const;

  std::string_view name() const override { return options_.name; }
  Result<void> on_map(const Mapping&) override { return {}; }
  void on_map_done(const Mapping& mapping, bool mapped) override;
  Result<void> on_unmap(const Unmapping& unmapping) override;
  void on_unmap_done(const Unmapping& unmapping, bool unmapped) override;

  std::string_view pin_owner_name() const override { return options_.name; }
  void on_revoke(IovaRange range) override;

 private:
  struct Block {
    explicit Block(uint64_t first) : first_page(first) {}
    PageRun all() const { return {0, kBlockPages}; }  // by their numbers in the block

    uint64_t first_page;
    ExclusiveMutex mutex;
    PageBits mapped ABSL_GUARDED_BY(mutex);
    PageBits for_write ABSL_GUARDED_BY(mutex);  // of the mapped ones: how they are pinned
    PageBits used ABSL_GUARDED_BY(mutex);       // since the clock or drop_unused() came by
    PageBits young ABSL_GUARDED_BY(mutex);      // mapped since drop_unused() came by
    uint64_t users = 0;                         // guarded by blocks_lock_; it is not freed before
  };
  // Keeps a block while it is used; one without mapped pages goes with the last user.
  class BlockHold;
  // A mapping of the VMM.
  struct Place {
    PageRun pages;
    Access access;
    std::byte* host;    // of the first page
    bool is_any_going;  // some range of the VM is on its way out
    std::byte* host_of(uint64_t page) const { return host + BytesIn(page - pages.first); }
  };
  // Why a fault has to wait for pages to be dropped.
  struct Shortage {
    uint64_t pages = 0;
    std::optional<Error> error;  // of who had no room, unless it was this domain
  };

  // Keeps the block, which is made if there is none.
  BlockHold HoldBlock(uint64_t first_page) const;
  // The first block that begins there or later; empty when there is none.
  BlockHold HoldNextBlock(uint64_t first_page) const;
  std::unique_ptr<Block> MakeBlock(uint64_t first_page) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(blocks_lock_);
  // Nobody uses the block any more: if nothing is mapped in it either, the last one that was left
  // so is forgotten.
  void LeaveBlock(Block* block) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(blocks_lock_);
  static bool IsUnused(const Block& block);
  uint64_t CountBlocks() const;

  Result<Resolved> Resolve(Iova iova, Access access);
  // nullopt: there was no room.
  std::optional<Result<Resolved>> TryFault(Block& block, uint64_t page, Access access,
                                           Shortage* shortage);
  std::optional<Result<Resolved>> MapLocked(Block& block, PageRun pages, const Place& place,
                                            Shortage* shortage)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(block.mutex);
  // The pages to map for a fault.
  PageRun WindowLocked(const Block& block, uint64_t page, const Place& place) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(block.mutex);
  Result<void> PinAndMapLocked(Block& block, PageRun pages, const Place& place)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(block.mutex);
  // Unmaps and unpins those of the pages that are mapped, by their numbers in the block; returns
  // how many.
  uint64_t TakeOutLocked(Block& block, const PageBits& pages, PageRun within)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(block.mutex);
  void ReleaseLocked(const Block& block, std::span<const PageRun> going, Access access)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(block.mutex);
  uint64_t TakeOutRange(IovaRange range);
  bool Reserve(uint64_t pages, uint64_t* missing);

  // faulting_clock.cc
  // Whether a page was used since it was asked last, and forgets that.
  bool TakeUsedLocked(Block& block, uint64_t index) ABSL_EXCLUSIVE_LOCKS_REQUIRED(block.mutex);
  // Of the pages from *index on: takes up to `wanted` out that were not used, or, with `any`, used
  // or not; *index is where it stopped.
  uint64_t SweepLocked(Block& block, uint64_t* index, uint64_t wanted, bool any)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(block.mutex);
  // Makes room. Returns how many pages went, 0 when there are none.
  uint64_t Evict(uint64_t wanted);
  uint64_t DropUnusedLocked(Block& block) ABSL_EXCLUSIVE_LOCKS_REQUIRED(block.mutex);

  // faulting_mappings.cc
  // The mapping around a page. With the lock of the page's block held it does not go while that is
  // held; kBusy while it is on its way out.
  Result<Place> PlaceOf(uint64_t page, Access access) const;
  tl::unexpected<Error> PlaceError(ErrorCode code, uint64_t page, Access wanted,
                                   Access mapped) const;
  bool IsGoingLocked(IovaRange range) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mappings_lock_);
  void BeginGoing(IovaRange range);
  void EndGoing(IovaRange range);

  const Options options_;
  const Parts parts_;
  const std::unique_ptr<PinContext> context_;

  ExclusiveMutex clock_mutex_;
  uint64_t hand_ ABSL_GUARDED_BY(clock_mutex_) = 0;  // a page

  mutable SpinLock blocks_lock_;
  // By first page. Each but one has mapped pages or users. Mutable: who only looks is a user too.
  mutable absl::btree_map<uint64_t, std::unique_ptr<Block>> blocks_ ABSL_GUARDED_BY(blocks_lock_);
  // The one that may have neither, and one that was forgotten, for the next that is needed: lone
  // pages that come and go allocate nothing.
  mutable Block* last_left_ ABSL_GUARDED_BY(blocks_lock_) = nullptr;
  mutable std::unique_ptr<Block> spare_block_ ABSL_GUARDED_BY(blocks_lock_);

  mutable SpinLock mappings_lock_;
  absl::btree_map<uint64_t, Mapping> mappings_ ABSL_GUARDED_BY(mappings_lock_);  // by first IOVA
  std::vector<IovaRange> going_ ABSL_GUARDED_BY(mappings_lock_);

  // Relaxed: numbers, nothing is published with them.
  std::atomic<uint64_t> pinned_{0};
  std::atomic<uint64_t> peak_pinned_{0};
  struct {
    std::atomic<uint64_t> faults{0}, pages_mapped{0}, already_there{0}, retries{0}, failures{0},
        evicted{0}, invalidated{0}, revoked{0};
  } count_;
};

class FaultingDomain::BlockHold {
 public:
  BlockHold() = default;
  BlockHold(const FaultingDomain* domain, Block* block) : domain_(domain), block_(block) {}
  BlockHold(BlockHold&& other) noexcept
      : domain_(other.domain_), block_(std::exchange(other.block_, nullptr)) {}
  BlockHold& operator=(BlockHold&&) = delete;
  ~BlockHold() {
    if (block_ == nullptr) return;
    SpinLockHold lock(domain_->blocks_lock_);
    if (--block_->users == 0) domain_->LeaveBlock(block_);
  }
  explicit operator bool() const { return block_ != nullptr; }
  Block* get() const { return block_; }

 private:
  const FaultingDomain* domain_ = nullptr;
  Block* block_ = nullptr;
};

}  // namespace mvgpu::domain
