#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <optional>
#include <set>
#include <utility>

#include "apionly-domain/coiommu/coiommu_device.h"
#include "tests/apionly-domain/domain_fixture.h"
#include "tests/apionly-domain/faults/checked_target.h"
#include "tests/fakes/coiommu_guest.h"

namespace mvgpu::domain {

// A VM with the coIOMMU device and a driver for it: 4 MiB of RAM at 0, its last quarter for the
// tracking table. Every test ends with nothing pinned.
class CoiommuTest : public DomainTest {
 protected:
  static constexpr uint64_t kTables = 0x30'0000;
  static constexpr uint64_t kBatch = 0x2f'0000;
  static constexpr uint64_t kFrames = 0x2e0;  // those below are the drivers'

  void SetUp() override {
    DomainTest::SetUp();
    Map(0, 0, 0x40'0000);
    Begin({});
  }
  void TearDown() override {
    owner_.held.reset();
    End();
    DomainTest::TearDown();
  }
  void Begin(CoiommuPins::Options options, unsigned levels = 4) {
    End();
    target_ = std::make_unique<testing::CheckedTarget>(domain_.get());
    pins_of_guest_ = std::make_unique<CoiommuPins>(
        std::move(options), CoiommuPins::Parts{domain_.get(), target_.get()});
    device_ = std::make_unique<CoiommuDevice>(
        CoiommuDevice::Options{.devices = {0x28, 0x30}},
        CoiommuDevice::Parts{domain_.get(), pins_of_guest_.get(), requests_});
    guest_.emplace(
        &ram_, testing::CoiommuGuest::Options{.tables = kTables,
                                              .batch = kBatch,
                                              .levels = levels,
                                              .ask = [this](uint64_t request) { Ask(request); }});
    device_->write(CoiommuDevice::kRoot, kTables);
    device_->write(CoiommuDevice::kLevels, levels);
    device_->write(CoiommuDevice::kCommand, CoiommuDevice::kActivate);
  }
  void End() {
    device_.reset();
    pins_of_guest_.reset();
    target_.reset();
    EXPECT_EQ(domain_->counters().pinned_pages, 0u);
  }
  // As a vCPU does it.
  void Ask(uint64_t request, size_t vcpu = 0) {
    std::atomic_ref<uint64_t>(requests_[vcpu]).store(request);
    device_->write(CoiommuDevice::kDoorbells + vcpu, 1);
    EXPECT_EQ(std::atomic_ref<uint64_t>(requests_[vcpu]).load(), 0u);
  }
  uint32_t Word(uint64_t frame) { return guest_->word(frame).load(); }
  std::set<uint64_t> Shown() const { return target_->page_numbers(); }
  // What is pinned, counted and shown to the device are the same pages.
  void ExpectConsistent() const {
    const uint64_t pinned = pins_of_guest_->counters().pinned_pages;
    EXPECT_EQ(target_->pages().size(), pinned);
    EXPECT_EQ(domain_->counters().pinned_pages, pinned);
  }

  std::array<uint64_t, 4> requests_{};
  std::unique_ptr<testing::CheckedTarget> target_;
  std::unique_ptr<CoiommuPins> pins_of_guest_;
  std::unique_ptr<CoiommuDevice> device_;
  std::optional<testing::CoiommuGuest> guest_;
};

}  // namespace mvgpu::domain
