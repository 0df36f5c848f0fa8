#pragma once

#include <cstdint>
#include <string_view>

#include "apionly-domain/viommu/dma_space.h"
#include "apionly-domain/viommu/iommu_object.h"

namespace mvgpu::domain {

// Where the addresses that a device uses go, for those who give it pages and for those who follow
// it. Whether there is an IOMMU does not change while the device lives; whether it translates does,
// and is the guest's business: who has to hear of that registers at the object, in bypass too.
class DeviceAddressSpace {
 public:
  enum class Kind : uint8_t {
    kGuestMemory,  // the guest sees no IOMMU before this device
    kBypassed,     // it sees one, and has not switched it on
    kTranslated,
  };

  // Of a device without an IOMMU.
  DeviceAddressSpace() = default;
  // Both outlive this; the object is that of the IOMMU which translates.
  DeviceAddressSpace(DmaSpace* translations, const IommuObject* iommu)
      : translations_(translations), iommu_(iommu) {}

  Kind kind() const {
    if (iommu_ == nullptr) return Kind::kGuestMemory;
    return iommu_->is_bypassed() ? Kind::kBypassed : Kind::kTranslated;
  }
  // What stands behind the addresses; null for kGuestMemory, and only then.
  const IommuObject* iommu() const { return iommu_; }
  // Who says where they lie; likewise.
  DmaSpace* translations() const { return translations_; }

 private:
  DmaSpace* translations_ = nullptr;
  const IommuObject* iommu_ = nullptr;
};

// As reports have it: "guest-memory", "bypassed", "translated".
constexpr std::string_view AddressesName(DeviceAddressSpace::Kind kind) {
  switch (kind) {
    case DeviceAddressSpace::Kind::kGuestMemory:
      return "guest-memory";
    case DeviceAddressSpace::Kind::kBypassed:
      return "bypassed";
    case DeviceAddressSpace::Kind::kTranslated:
      break;
  }
  return "translated";
}

}  // namespace mvgpu::domain
