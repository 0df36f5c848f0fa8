// The lock of a page goes from a pin back end to a device's mapping and back. The fakes look at
// each call: a page that is held is never without either (tests/fakes/page_keeper.h).

#include <atomic>
#include <thread>

#include "apionly-domain/pin/mlock_pin_backend.h"
#include "tests/apionly-domain/hand_over/hand_over_fixture.h"
#include "tests/fakes/fake_memory_locker.h"

namespace mvgpu::domain {
namespace {

using testing::FailsWith;
using testing::FakeMemoryLocker;
using testing::GuestRam;
using ::testing::HasSubstr;
using testing::IsOk;
using testing::IsOkAndHolds;
using testing::MakeRange;
using testing::PageKeeper;

IovaRange Pages(uint64_t first, uint64_t count) { return RangeOf({first, count}); }

// A VM with a vGPU and an assigned device.
class HandOverTest : public ::testing::Test {
 protected:
  void SetUp() override {
    keeper_.add_view(FileIn(container_, ram_));
    keeper_.add_view(FileIn(device_container_, ram_));
  }
  void TearDown() override {
    vgpu_.release_all();
    other_.release_all();
    EXPECT_THAT(container_.unmap_all(), IsOk());
    EXPECT_THAT(device_container_.unmap_all(), IsOk());
    for (const auto& [container, domain] : attached_) {
      EXPECT_THAT(container->detach(domain), IsOk());
    }
    EXPECT_EQ(keeper_.problem(), "");
    EXPECT_EQ(device_pins_.unique_pages(), 0u);
    EXPECT_EQ(keeper_.mapped_pages(), 0u);
    EXPECT_EQ(vgpu_.locked_pages() + other_.locked_pages(), 0u);
  }
  void Attach(Container& container, Domain* domain) {
    ASSERT_THAT(container.attach(domain), IsOk());
    attached_.emplace_back(&container, domain);
  }
  void Detach(Container& container, Domain* domain) {
    ASSERT_THAT(container.detach(domain), IsOk());
    std::erase(attached_, std::pair(&container, domain));
  }
  void Map(Container& container, uint64_t iova_page, uint64_t ram_page, uint64_t pages) {
    ASSERT_THAT(container.map(Request(iova_page, ram_page, pages)), IsOk());
  }
  Container::MapRequest Request(uint64_t iova_page, uint64_t ram_page, uint64_t pages) {
    return ram_.map_request(BytesIn(iova_page), BytesIn(ram_page), BytesIn(pages));
  }
  // What the device sees at an IOVA page is there.
  static bool Sees(WatchedDevice& device, uint64_t iova_page) {
    return !device.space().shown_pages(Pages(iova_page, 1)).empty();
  }

  GuestRam ram_{64 * kPageSize};
  PageKeeper keeper_;
  DevicePins device_pins_;
  Container container_;
  Container device_container_;  // of a device that does not see all of the VM's memory
  WatchedDomain vgpu_{0, &keeper_, &device_pins_, nullptr};
  WatchedDomain other_{1, &keeper_, &device_pins_, nullptr};
  WatchedDevice nic_{"nic", &keeper_, &device_pins_, nullptr};
  WatchedDevice disk_{"disk", &keeper_, &device_pins_, nullptr};
  std::vector<std::pair<Container*, Domain*>> attached_;
};

TEST_F(HandOverTest, PagesThatADeviceHoldsAreNotLocked) {
  Attach(container_, vgpu_.get());
  Attach(container_, nic_.get());
  Map(container_, 100, 0, 16);
  ASSERT_THAT(vgpu_.pin(Pages(102, 8)), IsOk());
  EXPECT_EQ(vgpu_.locked_pages(), 0u);
  EXPECT_EQ(vgpu_->counters().unique_pages, 8u);
  vgpu_.release_all();
  EXPECT_EQ(keeper_.lock_calls(), 0u);
  EXPECT_EQ(vgpu_->counters().unique_pages, 0u);
}

TEST_F(HandOverTest, ADeviceThatComesLateTakesTheLocksOverAndGivesThemBack) {
  Attach(container_, vgpu_.get());
  Map(container_, 100, 0, 16);
  ASSERT_THAT(vgpu_.pin(Pages(102, 4)), IsOk());
  ASSERT_THAT(vgpu_.pin(Pages(104, 6)), IsOk());
  EXPECT_EQ(vgpu_.locked_pages(), 8u);
  Attach(container_, nic_.get());
  EXPECT_EQ(vgpu_.locked_pages(), 0u);
  EXPECT_EQ(device_pins_.unique_pages(), 16u);
  vgpu_.release(0);  // 102-103 are held no longer
  Detach(container_, nic_.get());
  EXPECT_EQ(vgpu_.locked_pages(), 6u);
  EXPECT_EQ(device_pins_.unique_pages(), 0u);
}

TEST_F(HandOverTest, ADeviceDoesNotLeaveWhenALockCannotBeHad) {
  Attach(container_, vgpu_.get());
  Attach(container_, nic_.get());
  Map(container_, 100, 0, 8);
  Map(container_, 200, 20, 8);
  ASSERT_THAT(vgpu_.pin(Pages(102, 1)), IsOk());
  ASSERT_THAT(vgpu_.pin(Pages(104, 1)), IsOk());
  ASSERT_THAT(vgpu_.pin(Pages(203, 1)), IsOk());
  for (uint64_t call = 1; call <= 3; ++call) {  // each of the three runs
    keeper_.fail_at_call(call);
    const auto detached = container_.detach(nic_.get());
    ASSERT_THAT(detached, FailsWith(ErrorCode::kLimit)) << call;
    EXPECT_THAT(detached.error().message(),
                HasSubstr("stays mapped for nic: vgpu0 has file pages"));
    EXPECT_THAT(detached.error().message(), HasSubstr("fake lock failure"));
    EXPECT_EQ(vgpu_.locked_pages(), 0u) << "what was taken back is given up again";
    EXPECT_EQ(device_pins_.unique_pages(), 16u);
    EXPECT_TRUE(Sees(nic_, 102) && Sees(nic_, 203));
  }
  keeper_.fail_at_call(0);
  Detach(container_, nic_.get());
  EXPECT_EQ(vgpu_.locked_pages(), 3u);
}

TEST_F(HandOverTest, AnUnmapNeedsNoLocksOfWhoLetsGo) {
  Attach(container_, nic_.get());
  Attach(container_, vgpu_.get());  // later, and yet it hears of unmaps first
  Map(container_, 100, 0, 8);
  ASSERT_THAT(vgpu_.pin(Pages(100, 8)), IsOk());
  EXPECT_THAT(container_.unmap(Iova(BytesIn(100)), BytesIn(8)), IsOkAndHolds(BytesIn(8)));
  EXPECT_EQ(keeper_.lock_calls(), 0u);
  EXPECT_EQ(vgpu_.pins(), 0u);
}

TEST_F(HandOverTest, AnUnmapThatIsRefusedLeavesThePagesWithTheDevice) {
  Attach(container_, vgpu_.get());
  Attach(container_, nic_.get());
  Attach(container_, disk_.get());
  Map(container_, 100, 0, 8);
  Map(container_, 200, 0, 8);  // the same pages
  ASSERT_THAT(vgpu_.pin(Pages(100, 2)), IsOk());
  std::byte* const host = container_.mappings().front().file->host_address(BytesIn(4));
  const auto address = disk_->use({Pages(204, 1), host}, Access::kRead).address;
  ASSERT_TRUE(address);
  // The disk's refusal comes when the nic has agreed.
  EXPECT_THAT(container_.unmap(Iova(BytesIn(200)), BytesIn(8)), FailsWith(ErrorCode::kBusy));
  EXPECT_EQ(device_pins_.unique_pages(), 8u);
  EXPECT_EQ(vgpu_.locked_pages(), 0u);
  disk_->give_back(Pages(204, 1));
  EXPECT_THAT(container_.unmap(Iova(BytesIn(200)), BytesIn(8)), IsOk());
  EXPECT_EQ(vgpu_.locked_pages(), 0u) << "the devices still see the pages at the other iova";
}

// A sharer cloned from a sharer: each in turn is the last that keeps the pages.
TEST_F(HandOverTest, TheLastOfSeveralDevicesGivesTheLockBack) {
  Attach(container_, vgpu_.get());
  Map(container_, 100, 0, 8);
  ASSERT_THAT(vgpu_.pin(Pages(100, 8)), IsOk());
  Attach(container_, nic_.get());
  Attach(container_, disk_.get());
  Detach(container_, nic_.get());
  EXPECT_EQ(vgpu_.locked_pages(), 0u);
  Attach(container_, nic_.get());
  Detach(container_, disk_.get());
  EXPECT_EQ(vgpu_.locked_pages(), 0u);
  Detach(container_, nic_.get());
  EXPECT_EQ(vgpu_.locked_pages(), 8u);
  EXPECT_EQ(keeper_.lock_calls(), 2u);
}

TEST_F(HandOverTest, EachOfSeveralHoldersHasItsLockBackOrNone) {
  Attach(container_, vgpu_.get());
  Attach(container_, other_.get());
  Attach(container_, nic_.get());
  Map(container_, 100, 0, 8);
  ASSERT_THAT(vgpu_.pin(Pages(100, 4)), IsOk());
  ASSERT_THAT(other_.pin(Pages(102, 4)), IsOk());
  keeper_.fail_at_call(2);  // the other's
  EXPECT_THAT(container_.detach(nic_.get()), FailsWith(ErrorCode::kLimit));
  EXPECT_EQ(vgpu_.locked_pages() + other_.locked_pages(), 0u);
  Detach(container_, nic_.get());
  EXPECT_EQ(vgpu_.locked_pages(), 4u);
  EXPECT_EQ(other_.locked_pages(), 4u);
}

TEST_F(HandOverTest, WhoComesWhenADeviceIsThereLearnsOfItsPages) {
  Attach(container_, nic_.get());
  Map(container_, 100, 0, 8);
  WatchedDomain late(2, &keeper_, &device_pins_, nullptr);
  Attach(container_, late.get());
  ASSERT_THAT(late.pin(Pages(100, 8)), IsOk());
  EXPECT_EQ(late.locked_pages(), 0u);
  late.release_all();
  Detach(container_, late.get());
}

TEST_F(HandOverTest, AMappingThatOneOfTheDevicesRefusesChangesNoLock) {
  Attach(container_, vgpu_.get());
  Attach(container_, nic_.get());
  Attach(container_, disk_.get());
  keeper_.fail_at_call(2);  // the disk's
  EXPECT_THAT(container_.map(Request(100, 0, 8)), FailsWith(ErrorCode::kLimit));
  EXPECT_EQ(keeper_.mapped_pages(), 0u);
  EXPECT_EQ(device_pins_.unique_pages(), 0u);
}

TEST_F(HandOverTest, ADeviceThatCannotJoinHasTakenNoLock) {
  Attach(container_, vgpu_.get());
  Map(container_, 100, 0, 8);
  Map(container_, 200, 8, 8);
  ASSERT_THAT(vgpu_.pin(Pages(100, 8)), IsOk());
  keeper_.fail_at_call(2);
  EXPECT_THAT(container_.attach(nic_.get()), FailsWith(ErrorCode::kLimit));
  EXPECT_EQ(vgpu_.locked_pages(), 8u);
  EXPECT_EQ(keeper_.lock_calls(), 1u) << "the lock was there all the time";
  EXPECT_EQ(keeper_.mapped_pages(), 0u);
}

// As behind a virtual IOMMU: the same pages of the same file, in a container with other addresses.
TEST_F(HandOverTest, OnlyWhatTheDeviceMapsIsNotLocked) {
  Attach(container_, vgpu_.get());
  Attach(device_container_, nic_.get());
  Map(container_, 100, 0, 16);
  ASSERT_THAT(vgpu_.pin(Pages(102, 8)), IsOk());
  Map(device_container_, 7, 4, 2);
  EXPECT_EQ(vgpu_.locked_pages(), 6u);
  ASSERT_THAT(vgpu_.pin(Pages(100, 16)), IsOk());
  EXPECT_EQ(vgpu_.locked_pages(), 14u);
  Map(device_container_, 20, 5, 8);  // page 5 at a second address
  EXPECT_EQ(vgpu_.locked_pages(), 7u);
  ASSERT_THAT(device_container_.unmap(Iova(BytesIn(20)), BytesIn(8)), IsOk());
  EXPECT_EQ(vgpu_.locked_pages(), 14u);
  vgpu_.release(1);
  EXPECT_EQ(vgpu_.locked_pages(), 6u);
  keeper_.fail_at_call(1);
  EXPECT_THAT(device_container_.unmap(Iova(BytesIn(7)), BytesIn(2)), FailsWith(ErrorCode::kLimit));
  EXPECT_TRUE(Sees(nic_, 7) && Sees(nic_, 8));
  EXPECT_EQ(device_container_.totals().mappings, 1u);
}

TEST_F(HandOverTest, APinThatIsRefusedHalfWayIsNone) {
  Attach(container_, vgpu_.get());
  Attach(device_container_, nic_.get());
  Map(container_, 100, 0, 16);
  Map(device_container_, 0, 4, 2);
  Map(device_container_, 2, 9, 2);
  for (uint64_t call = 1; call <= 3; ++call) {
    keeper_.fail_at_call(call);
    EXPECT_THAT(vgpu_.pin(Pages(100, 16)), FailsWith(ErrorCode::kLimit));
    EXPECT_EQ(vgpu_.locked_pages(), 0u);
  }
  keeper_.fail_at_call(0);
  EXPECT_THAT(vgpu_.pin(Pages(100, 16)), IsOk());
  EXPECT_EQ(vgpu_.locked_pages(), 12u);
}

// A cut takes the neighbours away for a moment: they are locked meanwhile.
TEST_F(HandOverTest, ACutLocksItsNeighboursForTheMoment) {
  Attach(container_, vgpu_.get());
  Attach(device_container_, nic_.get());
  Map(container_, 100, 0, 16);
  Map(device_container_, 0, 0, 16);
  ASSERT_THAT(vgpu_.pin(Pages(100, 16)), IsOk());
  ASSERT_THAT(device_container_.unmap(Iova(BytesIn(4)), BytesIn(2), Container::Cut::kSplit),
              IsOkAndHolds(BytesIn(2)));
  EXPECT_EQ(vgpu_.locked_pages(), 2u);
  EXPECT_EQ(device_pins_.unique_pages(), 14u);
  EXPECT_EQ(keeper_.problem(), "");
  // The next one cuts what is left, and is refused for want of a lock: nothing has changed.
  keeper_.fail_at_call(1);
  EXPECT_THAT(device_container_.unmap(Iova(BytesIn(8)), BytesIn(1), Container::Cut::kSplit),
              FailsWith(ErrorCode::kLimit));
  EXPECT_EQ(device_pins_.unique_pages(), 14u);
  EXPECT_EQ(vgpu_.locked_pages(), 2u);
}

TEST_F(HandOverTest, WhatTheIommuLosesInACutStaysLocked) {
  Attach(container_, vgpu_.get());
  Attach(device_container_, nic_.get());
  Map(container_, 100, 0, 16);
  Map(device_container_, 0, 0, 16);
  ASSERT_THAT(vgpu_.pin(Pages(100, 16)), IsOk());
  for (uint64_t call = 2; call <= 3; ++call) {  // 1 locks, 2 and 3 map the halves
    keeper_.fail_at_call(call);
    EXPECT_THAT(device_container_.unmap(Iova(BytesIn(4)), BytesIn(12), Container::Cut::kSplit),
                FailsWith(ErrorCode::kLimit));
    EXPECT_EQ(device_pins_.unique_pages(), 16u) << "mapped as before, and given up again";
    EXPECT_EQ(vgpu_.locked_pages(), 0u);
  }
  // Where even what was there cannot be mapped again, the locks stay.
  keeper_.fail_at_call(2, /*more=*/1);
  EXPECT_THAT(device_container_.unmap(Iova(BytesIn(4)), BytesIn(12), Container::Cut::kSplit),
              FailsWith(ErrorCode::kLimit));
  EXPECT_EQ(nic_.space().counters().lost_pages, 16u);
  EXPECT_EQ(device_pins_.unique_pages(), 0u);
  EXPECT_EQ(vgpu_.locked_pages(), 16u);
}

TEST_F(HandOverTest, ACutThatIsRefusedForOneLockGivesTheOthersUpAgain) {
  Attach(container_, vgpu_.get());
  Attach(device_container_, nic_.get());
  AssignedSpace space(std::make_unique<SoftwareIommu>(), {});
  auto user = AssignedDomain::Create({.name = "user"}, &space, /*ledger=*/nullptr);
  ASSERT_THAT(user, IsOk());
  Attach(device_container_, user->get());
  Map(container_, 100, 0, 16);
  Map(device_container_, 0, 0, 16);
  ASSERT_THAT(vgpu_.pin(Pages(100, 16)), IsOk());
  const auto try_unmap = [&](uint64_t first, uint64_t pages) {
    return device_container_.unmap(Iova(BytesIn(first)), BytesIn(pages), Container::Cut::kSplit);
  };
  // Somebody refuses when the nic has made the cuts, then the piece between is lost.
  std::byte* const host = device_container_.mappings().front().file->host_address(BytesIn(4));
  ASSERT_TRUE((*user)->use({Pages(4, 1), host}, Access::kRead).address);
  EXPECT_THAT(try_unmap(4, 4), FailsWith(ErrorCode::kBusy));
  (*user)->give_back(Pages(4, 1));
  keeper_.fail_at_call(2, /*more=*/1);
  EXPECT_THAT(try_unmap(5, 2), FailsWith(ErrorCode::kLimit));
  ASSERT_EQ(nic_.space().counters().lost_pages, 4u);
  ASSERT_EQ(vgpu_.locked_pages(), 4u);
  // A cut into both pieces that are left.
  keeper_.fail_at_call(2);
  EXPECT_THAT(try_unmap(2, 8), FailsWith(ErrorCode::kLimit));
  EXPECT_EQ(vgpu_.locked_pages(), 4u);
  EXPECT_EQ(device_pins_.unique_pages(), 12u);
  Detach(device_container_, user->get());
}

TEST_F(HandOverTest, AnIommuInSoftwareHoldsNothing) {
  AssignedSpace space(std::make_unique<SoftwareIommu>(), {});
  auto device = AssignedDomain::Create({.name = "soft", .device_pins = &device_pins_}, &space,
                                       /*ledger=*/nullptr);
  ASSERT_THAT(device, IsOk());
  Attach(container_, vgpu_.get());
  Attach(container_, device->get());
  Map(container_, 100, 0, 8);
  ASSERT_THAT(vgpu_.pin(Pages(100, 8)), IsOk());
  EXPECT_EQ(vgpu_.locked_pages(), 8u);
  EXPECT_EQ(device_pins_.unique_pages(), 0u);
  Detach(container_, device->get());
}

// Where locks are scattered, mlock takes granules: they stay as long as one of their pages is ours
// alone, and what a device holds in them is then counted twice.
TEST_F(HandOverTest, AGranuleThatTheDeviceHoldsInPartStaysLocked) {
  auto locker = std::make_shared<FakeMemoryLocker::State>();
  auto domain = ApiOnlyDomain::Create(
      {.device_pins = &device_pins_},
      std::make_unique<MlockPinBackend>(16, std::make_unique<FakeMemoryLocker>(locker)), nullptr,
      nullptr);
  ASSERT_THAT(domain, IsOk());
  Attach(container_, domain->get());
  Attach(device_container_, nic_.get());
  Map(container_, 100, 0, 64);
  Map(device_container_, 0, 41, 8);
  const auto locked = [&] {
    EXPECT_EQ((*domain)->counters().locked_pages, locker->locked.size());
    return locker->locked.size();
  };
  {
    const auto pins = (*domain)->open_context(&vgpu_);
    std::vector<PinnedRange> scattered;
    for (uint64_t page = 100; page < 118; page += 2) {
      scattered.push_back(*pins->pin(Pages(page, 1), Access::kRead));
    }
    const uint64_t before = locked();
    auto ours = pins->pin(Pages(140, 1), Access::kRead);
    auto theirs = pins->pin(Pages(141, 1), Access::kRead);
    ASSERT_GT(locked(), before + 1) << "a granule";
    const uint64_t with_granule = locked();
    const std::byte* const host = ours->runs().front().host;
    EXPECT_TRUE(locker->is_held(host));
    EXPECT_EQ(keeper_.mappings_of(41), 1u);
    // The device leaves, and comes back.
    ASSERT_THAT(device_container_.unmap(Iova(0), BytesIn(8)), IsOk());
    EXPECT_TRUE(locker->is_held(host + kPageSize)) << "brought in too";
    EXPECT_EQ(locked(), with_granule);
    Map(device_container_, 0, 41, 8);
    EXPECT_EQ(locked(), with_granule);
    ours->reset();
    EXPECT_EQ(locked(), before) << "nothing in it is ours alone any more";
  }
  Detach(container_, domain->get());
}

// For the thread sanitizer, and for a page that is held all the time.
TEST_F(HandOverTest, PinsGoOnWhileADeviceComesAndGoes) {
  Attach(container_, vgpu_.get());
  Map(container_, 100, 0, 64);
  ASSERT_THAT(vgpu_.pin(Pages(120, 8)), IsOk());
  std::atomic<bool> stop = false;
  std::thread pinner([&] {
    const auto pins = vgpu_->open_context(&vgpu_);
    for (uint64_t i = 0; !stop; ++i) {
      const auto pin = pins->pin(Pages(100 + i * 7 % 50, 1 + i % 14), Access::kRead);
      EXPECT_THAT(pin, IsOk());
    }
  });
  for (int i = 0; i < 200; ++i) {
    Attach(container_, nic_.get());
    Detach(container_, nic_.get());
  }
  stop = true;
  pinner.join();
  EXPECT_EQ(vgpu_.locked_pages(), 8u);
}

}  // namespace
}  // namespace mvgpu::domain
