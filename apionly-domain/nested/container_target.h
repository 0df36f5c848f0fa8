#pragma once

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/container.h"
#include "apionly-domain/nested/nested_target.h"

namespace mvgpu::domain {

// A device's own container as the target: each page a mapping of the file that it stands in, and so
// whatever is attached there (an IOMMU's domain, say) hears of it. This is how QEMU follows a
// guest's tables through VFIO, and what remains where a device has no better way to take mappings:
// pages one by one, since the guest may take any of them away.
//
// REQUIRES: every domain attached to the container lets go when it is told to.
class ContainerTarget final : public NestedTarget {
 public:
  // Both outlive this. The container is not the one with the guest's memory.
  ContainerTarget(const ApiOnlyDomain* guest, Container* container)
      : guest_(*guest), container_(*container) {}

  // Errors: those of Container::map().
  Result<void> map(IovaRange iova, GuestPhys start, Access access) override;
  void unmap(IovaRange iova) override;

 private:
  Result<void> MapPage(Iova iova, GuestPhys page, Access access);

  const ApiOnlyDomain& guest_;
  Container& container_;
};

}  // namespace mvgpu::domain
