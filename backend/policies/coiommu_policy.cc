#include <fmt/format.h>

#include <array>
#include <atomic>
#include <memory>
#include <optional>

#include "apionly-domain/assigned/device_target.h"
#include "apionly-domain/coiommu/coiommu_device.h"
#include "apionly-domain/coiommu/coiommu_pins.h"
#include "backend/policies/coiommu_driver.h"
#include "backend/policies/pinning_policy.h"

namespace mvgpu::backend {

namespace {

constexpr uint16_t kDevice = 0x28;  // 00:05.0
constexpr unsigned kLevels = domain::TrackingTable::LevelsFor(/*address_bits=*/48);

// coIOMMU with its own defaults: the device and the pins of apionly-domain/coiommu, and a driver.
class CoiommuPolicy final : public PinningPolicy {
 public:
  explicit CoiommuPolicy(PolicyGuest* guest)
      : guest_(*guest),
        target_(&guest->space()),
        pins_({}, {&guest->domain(), &target_}),
        device_({.devices = {kDevice}}, {&guest->domain(), &pins_, requests_}) {}

  Result<void> begin() override {
    const uint64_t pages = guest_.trace().memory.back().last().page() + 1;
    const uint64_t size = CoiommuDriver::MemoryFor(pages, kLevels);
    MVGPU_ASSIGN_OR_RETURN(const PolicyGuest::Extra tables, guest_.add_extra(size));
    driver_.emplace(CoiommuDriver::Options{.start = tables.start,
                                           .memory = {tables.bytes, size},
                                           .levels = kLevels,
                                           .device = kDevice,
                                           .ask = [this](uint64_t request) { Ask(request); }});
    device_.write(domain::CoiommuDevice::kRoot, tables.start.value());
    device_.write(domain::CoiommuDevice::kLevels, kLevels);
    device_.write(domain::CoiommuDevice::kCommand, domain::CoiommuDevice::kActivate);
    return {};
  }
  Result<void> map(uint32_t, const DmaBuffer& buffer) override {
    if (driver_->map(buffer.parts)) return {};
    return Fail(ErrorCode::kLimit, fmt::format("the host refused to pin one of {} pages from {:#x} "
                                               "on, or a page is mapped too often",
                                               buffer.pages(), BytesIn(buffer.parts[0].first)));
  }
  Result<void> unmap(uint32_t, const DmaBuffer& buffer) override {
    driver_->unmap(buffer.parts);
    return {};
  }
  void tick() override { pins_.scan(); }
  std::byte* reach(Iova page, domain::Access access) override {
    return guest_.iommu().translate(page, access);
  }
  uint64_t notifications() const override { return driver_->notifications(); }

 private:
  void Ask(uint64_t request) {
    std::atomic_ref<uint64_t>(requests_[0]).store(request, std::memory_order_release);
    device_.write(domain::CoiommuDevice::kDoorbells, 1);
  }

  PolicyGuest& guest_;  // outlives this: contract of MakePolicy()
  std::array<uint64_t, 1> requests_{};
  domain::SpaceTarget target_;
  domain::CoiommuPins pins_;
  domain::CoiommuDevice device_;
  std::optional<CoiommuDriver> driver_;
};

}  // namespace

std::unique_ptr<PinningPolicy> MakeCoiommuPolicy(PolicyGuest* guest) {
  return std::make_unique<CoiommuPolicy>(guest);
}

}  // namespace mvgpu::backend
