#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/assigned/assigned_domain.h"
#include "apionly-domain/container.h"
#include "tests/apionly-domain/ledger_fixture.h"
#include "tests/fakes/guest_ram.h"
#include "tests/fakes/page_keeper.h"

namespace mvgpu::domain {

// The file of guest RAM as a container maps it, before anything else is mapped there.
inline std::shared_ptr<GuestFile> FileIn(Container& container, const testing::GuestRam& ram) {
  MVGPU_CHECK(container.map(ram.map_request(0, 0, kPageSize)).has_value());
  std::shared_ptr<GuestFile> file = container.mappings().front().file;
  MVGPU_CHECK(container.unmap_all().has_value());
  return file;
}

// A vGPU's domain whose pin back end is watched, and who pins through it.
class WatchedDomain final : public PinOwner {
 public:
  WatchedDomain(int locker, testing::PageKeeper* keeper, DevicePins* device_pins, Ledger* ledger)
      : locker_(locker), keeper_(*keeper) {
    auto domain = ApiOnlyDomain::Create(
        {.name = "vgpu" + std::to_string(locker),
         .unmap_deadline = std::chrono::milliseconds(0),
         .device_pins = device_pins},
        std::make_unique<testing::KeepingPinBackend>(keeper, locker), ledger, nullptr);
    EXPECT_THAT(domain, testing::IsOk());
    domain_ = std::move(*domain);
    pins_ = domain_->open_context(this);
  }
  ~WatchedDomain() override { release_all(); }

  Result<void> pin(IovaRange range) {
    MVGPU_ASSIGN_OR_RETURN(PinnedRange pin, pins_->pin(range, Access::kRead));
    held_.push_back({range, std::move(pin)});
    Want();
    return {};
  }
  void release(size_t index) {
    const PinnedRange going = std::move(held_[index].pin);
    held_.erase(held_.begin() + static_cast<ptrdiff_t>(index));
    Want();
  }
  void release_all() {
    while (!held_.empty()) release(0);
  }
  // Lets go of the pins in the range, if it ever does.
  void on_revoke(IovaRange range) override {
    for (size_t i = held_.size(); lets_go && i-- > 0;) {
      if (held_[i].range.overlaps(range)) release(i);
    }
  }
  std::string_view pin_owner_name() const override { return "owner"; }

  testing::PageKeeper::Pages held_pages() const {
    testing::PageKeeper::Pages pages;
    for (const Held& held : held_) {
      for (const PinnedRun& run : held.pin.runs()) {
        for (uint64_t i = 0; i < run.iova_pages().count; ++i) {
          pages.insert(keeper_.page_at(run.host) + i);
        }
      }
    }
    return pages;
  }
  size_t pins() const { return held_.size(); }
  int locker() const { return locker_; }
  uint64_t locked_pages() const { return keeper_.locked_pages(locker_); }
  ApiOnlyDomain* get() { return domain_.get(); }
  ApiOnlyDomain* operator->() { return domain_.get(); }

  bool lets_go = true;

 private:
  struct Held {
    IovaRange range;
    PinnedRange pin;
  };
  void Want() { keeper_.want(locker_, held_pages()); }

  const int locker_;
  testing::PageKeeper& keeper_;  // outlives this
  std::unique_ptr<ApiOnlyDomain> domain_;
  std::unique_ptr<PinContext> pins_;
  std::vector<Held> held_;
};

// An assigned device, behind an IOMMU that holds what it maps.
class WatchedDevice {
 public:
  WatchedDevice(std::string name, testing::PageKeeper* keeper, DevicePins* device_pins,
                Ledger* ledger)
      : space_(std::make_unique<testing::KeepingIommu>(keeper), {.prefer_below = Iova(0)}) {
    auto domain = AssignedDomain::Create({.name = std::move(name), .device_pins = device_pins},
                                         &space_, ledger);
    EXPECT_THAT(domain, testing::IsOk());
    domain_ = std::move(*domain);
  }
  AssignedDomain* get() { return domain_.get(); }
  AssignedDomain* operator->() { return domain_.get(); }
  AssignedSpace& space() { return space_; }

 private:
  AssignedSpace space_;
  std::unique_ptr<AssignedDomain> domain_;
};

}  // namespace mvgpu::domain
