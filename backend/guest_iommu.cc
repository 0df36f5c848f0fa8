#include "backend/guest_iommu.h"

namespace mvgpu::backend {

GuestIommu::GuestIommu(const Options& options, domain::ApiOnlyDomain* memory)
    : object_(options.limits),
      unit_(options.unit, {memory, &object_, this}),
      space_(&unit_, &object_, options.space, options.asks_for_pages ? this : nullptr) {
  unit_.add_device(options.space.source);
}

}  // namespace mvgpu::backend
