#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "apionly-domain/access.h"
#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/pin/pinned_range.h"

namespace mvgpu::dma {

// Contiguous IOVAs with contiguous device addresses. Whole pages.
struct MappedRun {
  IovaRange iova;
  DmaAddr address;  // of iova.start()

  bool operator==(const MappedRun&) const = default;
};

// The stand-in for dma_map_page(): gives a device's view of pinned guest pages, whatever the device
// must be told: a host physical address, an IOVA of its IOMMU, a buffer device address. Called by
// the cache only, with a lock of the cache held, and once per page as long as somebody uses it.
class Mapper {
 public:
  virtual ~Mapper() = default;
  virtual std::string_view name() const = 0;

  // Maps all of the runs or none; appends to `mapped`, in the order of the runs and without gaps,
  // as few pieces as the device's addresses allow. `access` is what a device may do there: what the
  // VMM's mapping allows, not what one user of it wants, so that a page never has to be mapped
  // again for another direction. Errors: kLimit, kPermission, kNotReachable, kSystem; `mapped` is
  // as it was then.
  virtual Result<void> map(std::span<const domain::PinnedRun> runs, domain::Access access,
                           std::vector<MappedRun>* mapped) = 0;
  // The same for runs that have nothing to do with each other: each of them is mapped as by a map()
  // of its own, so nothing is gained by laying them side by side. For batches of lone pages.
  virtual Result<void> map_apart(std::span<const domain::PinnedRun> runs, domain::Access access,
                                 std::vector<MappedRun>* mapped);
  // REQUIRES: [address, address + size) was mapped, in one piece or in any cut of it.
  virtual void unmap(DmaAddr address, uint64_t size) = 0;
  // From now on no device reaches what was unmapped before: the pins may go.
  virtual void flush() {}

  // Whether `address` is still the device's address of the run's first byte, and so on to its last.
  // False where the page behind it moved in spite of its pin.
  virtual bool is_current(const domain::PinnedRun&, DmaAddr) { return true; }

  // What it did and holds, by name, for reports.
  using Figures = std::vector<std::pair<std::string_view, uint64_t>>;
  virtual Figures figures() const { return {}; }
};

// For a device that shares this process's address space (CPU renderers): the host pointer.
std::unique_ptr<Mapper> MakeNoneMapper();

}  // namespace mvgpu::dma
