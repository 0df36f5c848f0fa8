#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "apionly-domain/assigned/assigned_space.h"
#include "apionly-domain/assigned/software_iommu.h"
#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "backend/scenario/world.h"

namespace mvgpu::backend::scenario {

// The IOMMU in front of a device of the scenario, and the device's view through it.
class DeviceIommu {
 public:
  explicit DeviceIommu(domain::AssignedSpace::Options options = {})
      : DeviceIommu(std::make_unique<domain::SoftwareIommu>(), options) {}

  domain::AssignedSpace& space() { return space_; }
  // What the device reads at an address, as digits; "fault" where it does not get through.
  Result<std::string> bytes(uint64_t iova, uint64_t count) {
    const std::byte* const host = iommu_.translate(Iova(iova), domain::Access::kRead);
    return DeviceBytes(host, iova & kPageMask, count);
  }
  bool reaches(Iova iova) { return iommu_.translate(iova, domain::Access::kRead) != nullptr; }

 private:
  DeviceIommu(std::unique_ptr<domain::SoftwareIommu> iommu, domain::AssignedSpace::Options options)
      : iommu_(*iommu), space_(std::move(iommu), options) {}

  domain::SoftwareIommu& iommu_;  // the space's
  domain::AssignedSpace space_;
};

}  // namespace mvgpu::backend::scenario
