#pragma once

// For a device behind an IOMMU: the device's address of a page is an IOVA. Where a domain of an
// assigned device shows the page to the device already, it is the address there; otherwise one is
// allocated and the page is mapped at it. What one call maps anew lies in a row for the device,
// however scattered it is in host memory, as long as there is such a row.
//
// Where the IOMMU holds what it maps, no other lock of a page is needed beside its mapping:
// apionly-domain/assigned/mapping_pin_backend.h.
//
// What was unmapped is out of the device's reach after flush(), and only then may its IOVA mean
// another page. Cuts, and what they cost: apionly-domain/assigned/assigned_space.h.

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "apionly-domain/assigned/assigned_domain.h"
#include "apionly-domain/assigned/assigned_space.h"
#include "apionly-domain/pin/run_counter.h"
#include "dma-cache/mapped_run_list.h"
#include "dma-cache/mapper.h"

namespace mvgpu::dma {

// Not thread-safe.
class IommuMapper final : public Mapper {
 public:
  // Both must outlive the mapper; `assigned` may be null, and uses `space` too if it is not.
  explicit IommuMapper(domain::AssignedSpace* space, domain::AssignedDomain* assigned = nullptr)
      : space_(space), assigned_(assigned) {}
  // REQUIRES: everything is unmapped.
  ~IommuMapper() override { MVGPU_CHECK(own_.empty()); }

  std::string_view name() const override { return "iommu"; }
  // Errors: those of AssignedSpace::map().
  Result<void> map(std::span<const domain::PinnedRun> runs, domain::Access access,
                   std::vector<MappedRun>* mapped) override;
  void unmap(DmaAddr address, uint64_t size) override;
  void flush() override { space_->flush(); }
  // False for what an IOMMU could not map again after a cut.
  bool is_current(const domain::PinnedRun& run, DmaAddr address) override;
  // Now: allocated_pages, shared_pages (with the assigned domain), iommu_mappings, lost_pages.
  // Ever: cuts.
  Figures figures() const override;

 private:
  // Adjacent IOVAs of the guest that are to be mapped anew.
  struct Fresh {
    Iova first;
    std::vector<domain::AssignedSpace::HostRun> runs;
  };

  Result<void> MapRun(const domain::PinnedRun& run, domain::Access access, Fresh* fresh,
                      MappedRunList* list);
  Result<void> MapFresh(Fresh* fresh, domain::Access access, MappedRunList* list);
  Result<void> MapInARow(Iova first, std::span<const domain::AssignedSpace::HostRun> runs,
                         domain::Access access, MappedRunList* list);

  domain::AssignedSpace* const space_;  // these two outlive this, see the constructor
  domain::AssignedDomain* const assigned_;
  domain::RunCounter own_;  // device pages allocated here; all others are the assigned domain's
  uint64_t shared_pages_ = 0;
};

}  // namespace mvgpu::dma
