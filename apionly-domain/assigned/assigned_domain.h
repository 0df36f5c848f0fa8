#pragma once

// The domain of a device that is assigned to the VM beside the vGPU: whatever the VMM maps with a
// file behind it, the device sees at the same IOVA, for as long as it is mapped. Where the api-only
// domain stores translations, this one has an IOMMU do them; nothing has to be pinned by request,
// because the IOMMU holds all of it.
//
// It joins its container at any time, and leaves at any time that nobody uses an address of its.
// What it maps, it holds in the VM's ledger. Where the IOMMU is a real one, pages that it maps need
// no lock of a pin back end beside it (pin/device_pins.h): locks are given up when the VMM's
// mapping is there for every domain, and taken back before any of it goes, also where a cut takes a
// neighbour away for a moment. An unmap, or leaving, is refused when a lock cannot be had.
//
// A VMM's mapping without a file cannot be shown to a device, and is left out. A mapping where the
// IOMMU has no addresses (on x86: 0xfee00000) is refused, as VFIO does.

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <absl/container/btree_map.h>

#include "apionly-domain/accounting/ledger.h"
#include "apionly-domain/assigned/assigned_space.h"
#include "apionly-domain/assigned/mapped_charges.h"
#include "apionly-domain/base/mutex.h"
#include "apionly-domain/domain.h"
#include "apionly-domain/pin/device_pins.h"
#include "apionly-domain/pin/pinned_range.h"
#include "apionly-domain/pin/run_counter.h"

namespace mvgpu::domain {

// Thread-safe. Lock order: the container's change lock or a cache's lock, this one, the space's.
// The locks of DevicePins and of its sharers are taken with the change lock alone.
class AssignedDomain final : public Domain {
 public:
  struct Options {
    std::string name = "assigned";
    DevicePins* device_pins = nullptr;  // outlives the domain; null: nobody gives up locks for it
  };
  // The space and the ledger (may be null) must outlive the domain. Errors: those of
  // Ledger::join().
  static Result<std::unique_ptr<AssignedDomain>> Create(Options options, AssignedSpace* space,
                                                        Ledger* ledger);
  // REQUIRES: detached from its container.
  ~AssignedDomain() override;

  // The address at which the device sees the first pages of a run with this access already, and how
  // many pages that is true for; no address: for how many pages it does not. The device is then
  // taken to use them until give_back().
  struct Found {
    std::optional<Iova> address;
    uint64_t pages = 0;
  };
  Found use(const PinnedRun& run, Access access);
  // REQUIRES: the addresses came from use(), in any cut.
  void give_back(IovaRange addresses);

  uint64_t used_pages() const;  // sum over uses

  std::string_view name() const override { return options_.name; }
  bool is_relied_on() const override { return true; }
  // Also the errors of LedgerRow::hold().
  Result<void> on_map(const Mapping& mapping) override;
  void on_map_done(const Mapping& mapping, bool mapped) override;
  // Also kBusy when somebody uses an address in the range, and the errors of PinBackend::pin() of
  // who holds pages there that are in no other device's reach.
  Result<void> on_unmap(const Unmapping& unmapping) override;
  void on_unmap_done(const Unmapping& unmapping, bool unmapped) override;

 private:
  using Mappings = absl::btree_map<uint64_t, Mapping>;  // by first IOVA; disjoint

  AssignedDomain(Options options, AssignedSpace* space, std::unique_ptr<LedgerRow> row);

  Found FindLocked(const PinnedRun& run, Access access) const ABSL_SHARED_LOCKS_REQUIRED(mutex_);
  void RemoveLocked(IovaRange range) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  Result<void> BeginUnmap(IovaRange range);
  void UnmapFromDevice(const Mapping& mapping);
  // The parts of mappings_ in these IOVA pages.
  std::vector<Mapping> MappingsIn(PageRun pages) const;

  // Makes the mapping one that goes without a cut, and takes its pages back.
  Result<void> Isolate(const Mapping& mapping);
  // Tells DevicePins that the IOMMU holds what the device sees of these IOVA pages.
  void HandOver(PageRun pages);
  // The IOMMU is about to hold nothing there any more; all of it, or an error and nothing.
  Result<void> TakeBack(IovaRange range);
  bool hands_over() const { return options_.device_pins != nullptr && space_->holds_memory(); }

  uint64_t ShownPages(IovaRange range) const;
  void ShowLockedPages();

  const Options options_;
  AssignedSpace* const space_;  // outlives this, see Create()

  // Only used by what the container calls, one call at a time.
  MappedCharges charges_;
  RunCounter handed_over_;  // IOVA pages of which DevicePins knows
  uint64_t locked_pages_ =
      0;  // that the IOMMU has been asked to hold: each IOVA, without lost ones

  mutable Mutex mutex_;
  Mappings mappings_ ABSL_GUARDED_BY(mutex_);  // those that the device sees
  RunCounter used_ ABSL_GUARDED_BY(mutex_);    // by IOVA page
  std::optional<IovaRange> going_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace mvgpu::domain
