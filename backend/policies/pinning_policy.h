#pragma once

// How the pages that a guest uses for DMA come to be pinned, and how they go: the ways that the
// threads behind this project compare, each driving the parts of this project that do it, on the
// same back end. `mvgpu-replay compare` shows them side by side.
//
//   static       all memory, from the start: VFIO pass-through without a vIOMMU
//   map-unmap    what is mapped, as long as it is: an emulated IOMMU in strict mode
//   kvmgt        what is mapped, page by page, counted: KVMGT's cache of GPA -> dma_addr
//   coiommu      first use pins, two scans without use unpin (USENIX ATC 2020; coiommu/)
//   iopf         the device's faults pin, with those around them; what is not used for a
//                period goes (faults/)
//   mvgpu        our backend's default: what is mapped, through DmaCache without idle pages
//   mvgpu-idle   the same with an idle list of 1/256 of the guest's memory
//   mvgpu-ahead  the same, and a miss brings its aligned 2 MiB along, as idle pages; 1/8 of
//                the idle list where that is less
//
// Notifications are what interrupts the guest for the policy's sake: an exit for an unmap or a map
// (map-unmap), a trapped write to a table (kvmgt), a doorbell (coiommu), a fault (iopf). Ours need
// none of their own, since the request that brings a buffer comes anyway; each map that finds a
// page missing is counted as one all the same.

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "apionly-domain/access.h"
#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "backend/policies/dma_trace.h"
#include "backend/policies/policy_guest.h"

namespace mvgpu::backend {

// One policy at work on one guest. Not thread-safe. The destructor lets go of everything.
class PinningPolicy {
 public:
  // How often tick() comes, in the time of the trace: coIOMMU's default.
  static constexpr std::chrono::seconds kPeriod{60};

  virtual ~PinningPolicy() = default;

  // Before the first event. All errors end the run: those of pins, and of the IOMMU.
  virtual Result<void> begin() { return {}; }
  virtual Result<void> map(uint32_t id, const DmaBuffer& buffer) = 0;
  virtual Result<void> unmap(uint32_t id, const DmaBuffer& buffer) = 0;
  // The device touches these pages; what has to happen for it to get there. Called while the buffer
  // is mapped.
  virtual Result<void> access(std::span<const PageRun> /*pages*/, domain::Access) { return {}; }
  virtual void tick() {}

  // Where the device ends up that touches a guest page, by way of the addresses it was given; null:
  // nowhere. Asked after access().
  virtual std::byte* reach(Iova page, domain::Access access) = 0;
  virtual uint64_t notifications() const = 0;
};

// By the names above; in the order in which a table shows them.
std::span<const std::string_view> PolicyNames();
// Names separated by commas; empty: all of them. kInvalid, with the list, where one is unknown or
// given twice.
Result<std::vector<std::string>> ParsePolicyNames(const std::string& list);
// `guest` outlives the policy. REQUIRES: the name is one of PolicyNames().
std::unique_ptr<PinningPolicy> MakePolicy(std::string_view name, PolicyGuest* guest);

// Each in its own file.
std::unique_ptr<PinningPolicy> MakeStaticPolicy(PolicyGuest* guest);
std::unique_ptr<PinningPolicy> MakeMapUnmapPolicy(PolicyGuest* guest);
std::unique_ptr<PinningPolicy> MakeKvmgtPolicy(PolicyGuest* guest);
std::unique_ptr<PinningPolicy> MakeCoiommuPolicy(PolicyGuest* guest);
std::unique_ptr<PinningPolicy> MakeIopfPolicy(PolicyGuest* guest);
struct CachePolicyOptions {
  uint64_t idle_pages = 0;   // at most
  uint64_t ahead_pages = 0;  // a power of two: what a miss brings along; 0: nothing
};
std::unique_ptr<PinningPolicy> MakeCachePolicy(PolicyGuest* guest, CachePolicyOptions options);

}  // namespace mvgpu::backend
