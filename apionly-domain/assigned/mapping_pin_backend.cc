#include "apionly-domain/assigned/mapping_pin_backend.h"

#include "apionly-domain/base/check.h"

namespace mvgpu::domain {

namespace {

class MappingPinBackend final : public PinBackend {
 public:
  explicit MappingPinBackend(const AssignedSpace* space) : space_(*space) {
    MVGPU_CHECK(space_.holds_memory());
  }
  std::string_view name() const override { return space_.iommu_name(); }
  Result<void> pin(const GuestFile&, PageRun) override { return {}; }
  void unpin(const GuestFile&, PageRun) override {}
  uint64_t locked_pages() const override { return space_.counters().mapped_pages; }
  uint32_t granule_pages(const GuestFile&) const override { return 1; }

 private:
  const AssignedSpace& space_;  // outlives this
};

}  // namespace

std::unique_ptr<PinBackend> MakeMappingPinBackend(const AssignedSpace* space) {
  return std::make_unique<MappingPinBackend>(space);
}

}  // namespace mvgpu::domain
