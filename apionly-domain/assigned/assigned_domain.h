#pragma once

// The domain of a device that is assigned to the VM beside the vGPU: whatever the VMM maps with a
// file behind it, the device sees at the same IOVA, for as long as it is mapped. Where the api-only
// domain stores translations, this one has an IOMMU do them; nothing has to be pinned by request,
// because the IOMMU holds all of it.
//
// It joins its container at any time and leaves at any time that nobody uses an address of its.
// Attach it after the api-only domains whose mappers ask here: domains hear of an unmap in the
// order in which they came, and the users of an address must have let go before.
//
// A VMM's mapping without a file cannot be shown to a device, and is left out. A mapping where the
// IOMMU has no addresses (on x86: 0xfee00000) is refused, as VFIO does.

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include <absl/container/btree_map.h>

#include "apionly-domain/assigned/assigned_space.h"
#include "apionly-domain/base/mutex.h"
#include "apionly-domain/domain.h"
#include "apionly-domain/pin/pinned_range.h"
#include "apionly-domain/pin/run_counter.h"

namespace mvgpu::domain {

// Thread-safe. Lock order: the container's change lock or a cache's lock, this one, the space's.
class AssignedDomain final : public Domain {
 public:
  // `space` must outlive the domain.
  AssignedDomain(std::string name, AssignedSpace* space) : name_(std::move(name)), space_(space) {}
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

  std::string_view name() const override { return name_; }
  Result<void> on_map(const Mapping& mapping) override;
  void on_map_done(const Mapping& mapping, bool mapped) override;
  // Also kBusy when somebody uses an address in the range.
  Result<void> on_unmap(const Unmapping& unmapping) override;
  void on_unmap_done(const Unmapping& unmapping, bool unmapped) override;

 private:
  using Mappings = absl::btree_map<uint64_t, Mapping>;  // by first IOVA; disjoint

  Found FindLocked(const PinnedRun& run, Access access) const ABSL_SHARED_LOCKS_REQUIRED(mutex_);
  void RemoveLocked(IovaRange range) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::string name_;
  AssignedSpace* const space_;  // outlives this, see the constructor
  mutable Mutex mutex_;
  Mappings mappings_ ABSL_GUARDED_BY(mutex_);  // those that the device sees
  RunCounter used_ ABSL_GUARDED_BY(mutex_);    // by IOVA page
  std::optional<IovaRange> going_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace mvgpu::domain
