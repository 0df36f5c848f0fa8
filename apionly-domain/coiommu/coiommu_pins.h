#pragma once

// Cooperative pinning: coIOMMU (USENIX ATC 2020; crosvm). The guest tells, in a table that both
// share, which pages its drivers have mapped for a device. A page is pinned when the guest asks for
// it first, and stays so when it is unmapped there; so a guest that maps the same pages again and
// again asks once (smart pinning). A scan from time to time unpins what the guest does not use any
// more (lazy unpinning):
//
//   count and ACCESSED as the guest left them      what a scan does
//   0, not accessed                                PINNED -> 0 in the table, unmap, unpin
//   anything else                                  clears ACCESSED; it is looked at again
//
// So a page goes after two scans without use. One that was in use for many scans is old, and looked
// at more rarely.
//
// Invariants
//   - Which pages are pinned is what `young_` and `old_` say, never what the table says. A guest
//     that lies in the table, or tears it down, may lose a mapping of its own, or keep a page
//     pinned for as long as the VMM leaves it there and within the limits; it cannot make a page be
//     pinned or released twice.
//   - To pin is pin, target, then the table's PINNED; to unpin is the table's, target, flush, then
//     unpin, with one lock for both. So a guest that sees PINNED after it counted is right, and one
//     that does not asks, and is served after the page has gone.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <absl/container/btree_map.h>

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/assigned/device_target.h"
#include "apionly-domain/base/mutex.h"
#include "apionly-domain/coiommu/tracking_table.h"

namespace mvgpu::domain {

// Thread-safe. Lock order: the guest container's change lock, this one's, then the pin lock or what
// the target locks.
class CoiommuPins final : public PinOwner {
 public:
  struct Options {
    std::string name = "coiommu";
    uint64_t max_pinned_pages = UINT64_MAX;
    uint32_t busy_rounds = 10;  // scans in use after which a page is old
    uint32_t old_every = 10;    // old pages are looked at in every n-th scan
    uint64_t max_unpins_per_scan = UINT64_MAX;
  };
  struct Parts {  // all outlive this
    ApiOnlyDomain* guest;
    DeviceTarget* target;
  };
  struct Counters {
    uint64_t pinned_pages = 0;  // now
    uint64_t old_pages = 0;     // of them
    uint64_t peak_pinned_pages = 0;
    uint64_t pins = 0;  // since creation
    uint64_t pinned_already = 0;
    uint64_t refused = 0;  // requests for a page
    uint64_t scans = 0;
    uint64_t unpins = 0;   // by scans
    uint64_t forced = 0;   // unpinned for the balloon
    uint64_t in_use = 0;   // refused to the balloon
    uint64_t revoked = 0;  // taken away by the VMM
  };

  CoiommuPins(Options options, Parts parts);
  // Unpins everything. REQUIRES: no unmap of the guest's memory is under way.
  ~CoiommuPins() override;

  // The guest's table; without one nothing is pinned. kBusy: there is one.
  Result<void> activate(TrackingTable table);
  // Unpins everything and forgets the table.
  void deactivate();
  // While it is parked, scans do nothing: the guest is about to free parts of the table.
  void set_parked(bool parked);

  // The guest maps this frame and found it not pinned. Pinned already is a success. Errors:
  // kInvalid (not active), kLimit, those of TrackingTable, PinContext::pin() and
  // DeviceTarget::map(); then it is not pinned by this.
  Result<void> pin(uint64_t frame);
  // Lazy unpinning, one round. Returns how many pages went.
  uint64_t scan();
  // The guest's balloon wants to give the frame back. False when a device may use it: the balloon
  // has to leave it alone.
  bool release_for_balloon(uint64_t frame);

  bool is_pinned(uint64_t frame) const;
  Counters counters() const;

  std::string_view pin_owner_name() const override { return options_.name; }
  void on_revoke(IovaRange range) override;

 private:
  struct Page {
    uint32_t busy_rounds = 0;
    Access access;  // how it is pinned
  };
  using Pages = absl::btree_map<uint64_t, Page>;  // by frame
  enum class Verdict : uint8_t { kUnused, kInUse };

  Result<Access> PinAndMapLocked(uint64_t frame) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  bool IsPinnedLocked(uint64_t frame) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return young_.contains(frame) || old_.contains(frame);
  }
  // Looks at the pages of one kind, a few at a time; takes what goes off *budget.
  uint64_t ScanPages(bool old, uint64_t* budget);
  uint64_t ScanSomeLocked(bool old, uint64_t* from, uint64_t* budget)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // What the table says; with kUnused the word does not say PINNED any more.
  static Verdict WithoutWord(const Error& error);
  Verdict LookLocked(uint64_t frame) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  Verdict ForceLocked(uint64_t frame) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Unmaps, flushes and unpins pages that are in no list any more.
  struct Going {
    uint64_t frame;
    Access access;
  };
  void LetGoLocked(std::span<const Going> pages) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Takes all pages of the run out, the table's PINNED first. Returns how many.
  uint64_t TakeOutLocked(PageRun frames) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const Options options_;
  const Parts parts_;
  const std::unique_ptr<PinContext> context_;

  mutable ExclusiveMutex mutex_;
  std::optional<TrackingTable> table_ ABSL_GUARDED_BY(mutex_);
  bool is_parked_ ABSL_GUARDED_BY(mutex_) = false;
  Pages young_ ABSL_GUARDED_BY(mutex_);
  Pages old_ ABSL_GUARDED_BY(mutex_);
  Counters counters_ ABSL_GUARDED_BY(mutex_);  // without pinned_pages and old_pages
};

}  // namespace mvgpu::domain
