#pragma once

// The api-only domain: a VFIO domain without IOMMU hardware behind it (the idea of the "api-only"
// iommu domain on qemu-devel, May 2016). Where a hardware domain programs translations into a
// device, this one stores them for later requests:
//
//   translate   IOVA -> backing page, checked against holes, permissions and the end of mappings
//   read/write  a CPU copy without a pin, for rings, descriptors and commands (VFIO's vfio_dma_rw)
//   pin         a hold on pages that a device will touch later (VFIO's vfio_pin_pages): the pages
//   are locked
//               by the pin back end and charged in the VM's ledger when the first holder comes, and
//               let go when the last one leaves
//
// Invariants
//   - A page is pinned by the back end iff at least one PinnedRange covers it; identity is (file,
//   page),
//     so a page seen at two IOVAs is pinned and charged once.
//   - No PinnedRange reaches memory whose mapping has gone: on_unmap() makes every owner let go
//   first.
//   - A failed pin changes nothing.
//
// Where to read next: container.h (where mappings come from), pinned_range.h (what a pin returns),
// pin/pin_backend.h, accounting/ledger.h, memory/guest_file.h (the only class that touches guest
// memory).

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <absl/container/btree_map.h>
#include <absl/container/flat_hash_map.h>

#include "apionly-domain/accounting/ledger.h"
#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/base/mutex.h"
#include "apionly-domain/container.h"
#include "apionly-domain/pin/pin_backend.h"
#include "apionly-domain/pinned_range.h"
#include "apionly-domain/run_counter.h"

namespace mvgpu::domain {

// Somebody who pins. Only the owner's own handles can release its pins.
class PinOwner {
 public:
  virtual ~PinOwner() = default;
  virtual std::string_view pin_owner_name() const = 0;
  // The mappings in the range are about to go. The owner releases what it holds there before it
  // returns, or the unmap is refused in its name. Called without the domain's lock: releasing is
  // allowed here, and new pins in the range fail with kBusy until the unmap is done.
  virtual void on_revoke(IovaRange range) = 0;
};

// Sees the guest bytes that leave guest memory, in the order in which they are used. For recording.
class AccessObserver {
 public:
  virtual ~AccessObserver() = default;
  virtual void on_guest_read(Iova iova, std::span<const std::byte> bytes) = 0;
};

// Thread-safe. Lock order: the container's lock, an owner's lock, then this one.
class ApiOnlyDomain final : public Domain {
 public:
  struct Options {
    std::string name = "api-only";
    uint64_t pin_limit_pages = UINT64_MAX;  // unique pages that may be pinned at a time
  };
  struct Counters {
    uint64_t mapped_pages = 0;        // with a file behind
    uint64_t pinned_pages = 0;        // sum over pins
    uint64_t unique_pages = 0;        // distinct backing pages among them
    uint64_t peak_unique_pages = 0;   // the most of them at a time
    uint64_t charged_pages = 0;       // of the unique ones, charged to this domain
    uint64_t locked_pages = 0;        // held by the pin back end, granules included
    uint64_t pin_calls = 0;           // successful ones since creation
    uint64_t pages_pinned = 0;        // page holds taken since creation
    uint64_t pages_locked_first = 0;  // of these, pages that nobody held before
    uint64_t revocations = 0;         // owners told to let go
  };

  // The ledger and the observer (may be null) must outlive the domain. Errors: those of
  // Ledger::join().
  static Result<std::unique_ptr<ApiOnlyDomain>> Create(Options options,
                                                       std::unique_ptr<PinBackend> backend,
                                                       Ledger* ledger, AccessObserver* observer);
  // REQUIRES: detached from its container, all pins released.
  ~ApiOnlyDomain() override;

  // Pins every page that the range touches. The range may lie over any number of adjacent mappings.
  // Errors: kNotMapped (hole), kPermission, kNotReachable (no file), kBusy (about to be unmapped),
  // kLimit, kTruncated, kSystem. `owner` must outlive the handle and every unmap under way.
  Result<PinnedRange> pin(IovaRange range, Access access, PinOwner* owner);

  // Whether pin() would find every page of the range mapped, reachable and allowed. Errors as
  // pin().
  Result<void> check(IovaRange range, Access access) const;

  // CPU copies without a pin. Errors: kNotMapped, kPermission, kNotReachable, kTruncated. On an
  // error nothing (write) or something undefined (read) was copied.
  Result<void> read(Iova iova, std::span<std::byte> destination) const;
  Result<void> write(Iova iova, std::span<const std::byte> source);
  // A copy out of pages that are pinned; no translation is needed.
  // REQUIRES: the run is part of a live PinnedRange and contains [iova, iova + size).
  Result<void> read_pinned(const PinnedRun& run, Iova iova, std::span<std::byte> destination) const;

  // A word in guest memory that both sides watch (ring indices): stored after everything written
  // before. It is an ordinary write, preceded by a release fence.
  Result<void> publish(Iova iova, std::span<const std::byte> source);

  Counters counters() const;

  std::string_view name() const override { return options_.name; }
  Result<void> on_map(const Mapping& mapping) override;
  Result<void> on_unmap(IovaRange range) override;
  void on_unmap_done(IovaRange range, bool unmapped) override;

 private:
  friend class PinnedRange;  // releases itself

  struct FilePins {
    std::shared_ptr<GuestFile> file;
    RunCounter pages;
  };

  ApiOnlyDomain(Options options, std::unique_ptr<PinBackend> backend, AccessObserver* observer);

  // Calls `visit(const Mapping&, IovaRange part)` for each mapping behind the range, in order,
  // until it fails. Errors: kNotMapped, kPermission, kNotReachable, or what the visitor returned.
  template <typename Visit>
  Result<void> WalkLocked(IovaRange range, Access access, Visit visit) const
      ABSL_SHARED_LOCKS_REQUIRED(mutex_);
  std::vector<PinOwner*> HoldersLocked(IovaRange range) const ABSL_SHARED_LOCKS_REQUIRED(mutex_);
  // Pins and charges runs that nobody held before: all of them, or none and an error.
  Result<void> HoldLocked(const GuestFile& file, const std::vector<PageRun>& fresh)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void LetGoLocked(const GuestFile& file, PageRun pages) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  Result<void> PinRunLocked(const PinnedRun& run) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void UnpinRunLocked(const PinnedRun& run) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void release(std::span<const PinnedRun> runs, PinOwner* owner);
  tl::unexpected<Error> CopyRangeError(Iova iova, uint64_t size) const;
  void PublishCountsLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const Options options_;
  AccessObserver* const observer_;  // outlives this, see Create()

  const std::string backend_name_;

  mutable Mutex mutex_;
  const std::unique_ptr<PinBackend> backend_ ABSL_PT_GUARDED_BY(mutex_);
  std::unique_ptr<LedgerRow> ledger_row_;  // set once by Create(); locks itself
  absl::btree_map<uint64_t, Mapping> mappings_ ABSL_GUARDED_BY(mutex_);  // by first IOVA; disjoint
  std::vector<IovaRange> revoking_ ABSL_GUARDED_BY(mutex_);              // unmaps under way
  absl::flat_hash_map<FileIdentity, FilePins> pins_by_file_ ABSL_GUARDED_BY(mutex_);
  absl::flat_hash_map<PinOwner*, RunCounter> pins_by_owner_
      ABSL_GUARDED_BY(mutex_);                          // by IOVA page
  uint32_t granule_pages_ ABSL_GUARDED_BY(mutex_) = 1;  // the largest, as the ledger shows it
  Counters counters_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace mvgpu::domain
