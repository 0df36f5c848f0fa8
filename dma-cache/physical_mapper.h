#pragma once

// For a device without an IOMMU in front of it: the device's address of a page is its host physical
// address, as the kernel tells it in /proc/self/pagemap. Pages that lie beside each other in
// physical memory become one run.
//
// A physical address is true as long as the page stays where it is, and not every pin promises
// that. An io_uring pin is a long-term one: the kernel first moves the page out of movable memory,
// then never again. mlock only promises that the page stays in memory: compaction
// (vm.compact_unevictable_allowed=1, the default), memory hotplug and NUMA balancing may still move
// it, and the device would then reach a page that is somebody else's. Therefore a device that does
// DMA by itself needs --pin=io-uring, or huge pages of hugetlbfs. is_current() notices a move.
//
// There is nothing to undo: unmap() takes nothing away from such a device, which reaches all of
// memory at all times. Only an IOMMU (iommu_mapper.h) can revoke.

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "dma-cache/mapper.h"
#include "dma-cache/pagemap.h"

namespace mvgpu::dma {

// Not thread-safe.
class PhysicalMapper final : public Mapper {
 public:
  // Errors: kPermission when the kernel hides page frame numbers from this process (it lacks
  // CAP_SYS_ADMIN in the first user namespace) or does not let it open its pagemap; kSystem when
  // there is none.
  static Result<std::unique_ptr<PhysicalMapper>> Create(
      const std::string& pagemap_path = "/proc/self/pagemap");

  std::string_view name() const override { return "physical"; }
  // Errors: kNotReachable (a page is not in memory, so nothing holds it there), kPermission,
  // kSystem.
  Result<void> map(std::span<const domain::PinnedRun> runs, domain::Access access,
                   std::vector<MappedRun>* mapped) override;
  Result<void> map_apart(std::span<const domain::PinnedRun> runs, domain::Access access,
                         std::vector<MappedRun>* mapped) override {
    return map(runs, access, mapped);
  }
  void unmap(DmaAddr address, uint64_t size) override;
  // Looks at every page of the run again. False also when it cannot be looked at any more.
  bool is_current(const domain::PinnedRun& run, DmaAddr address) override;
  // mapped_pages (now), moved_pages (found by is_current(), each time it is found).
  Figures figures() const override;

 private:
  explicit PhysicalMapper(Pagemap pagemap) : pagemap_(std::move(pagemap)) {}

  // Calls visit(page of the run, Entry) for each page in order; stops at its first error.
  template <typename Visit>
  Result<void> ForEachEntry(const domain::PinnedRun& run, Visit visit) const;
  Result<Pagemap::Entry> EntryAfterMigration(std::byte* page) const;

  const Pagemap pagemap_;
  uint64_t mapped_pages_ = 0;
  uint64_t moved_pages_ = 0;
};

}  // namespace mvgpu::dma
