#include "apionly-domain/coiommu/coiommu_pins.h"

#include "tests/apionly-domain/coiommu/coiommu_fixture.h"

namespace mvgpu::domain {
namespace {

using testing::FailsWith;
using testing::IsOk;

class CoiommuPinsTest : public CoiommuTest {};

TEST_F(CoiommuPinsTest, TheLifeOfAWord) {
  EXPECT_EQ(Word(0x45), 0u);
  const auto ask = [&] { return guest_->map(0x45); };
  guest_->word(0x45).store(0x4000'0001);  // counted, before the host is asked
  ASSERT_THAT(pins_of_guest_->pin(0x45), IsOk());
  EXPECT_EQ(Word(0x45), 0xc000'0001u);
  EXPECT_TRUE(ask());
  EXPECT_EQ(Word(0x45), 0xc000'0002u);
  EXPECT_EQ(guest_->notifications(), 0u);
  guest_->unmap(0x45);
  guest_->unmap(0x45);
  EXPECT_EQ(Word(0x45), 0xc000'0000u);
  EXPECT_EQ(pins_of_guest_->scan(), 0u);
  EXPECT_EQ(Word(0x45), 0x8000'0000u);
  EXPECT_EQ(Shown(), (std::set<uint64_t>{0x45}));
  EXPECT_EQ(pins_of_guest_->scan(), 1u);
  EXPECT_EQ(Word(0x45), 0u);
  EXPECT_TRUE(Shown().empty());
  ExpectConsistent();
}

TEST_F(CoiommuPinsTest, APageThatIsMappedIsKept) {
  ASSERT_TRUE(guest_->map(0x45));
  for (int i = 0; i < 50; ++i) EXPECT_EQ(pins_of_guest_->scan(), 0u);
  EXPECT_EQ(Word(0x45), 0x8000'0001u);
  guest_->unmap(0x45);
  // Old by now, and looked at in every tenth round; not accessed since.
  EXPECT_EQ(pins_of_guest_->counters().old_pages, 1u);
  for (int i = 0; i < 9; ++i) EXPECT_EQ(pins_of_guest_->scan(), 0u);
  EXPECT_EQ(pins_of_guest_->scan(), 1u);
}

TEST_F(CoiommuPinsTest, APageIsOldAfterTenRoundsInUse) {
  ASSERT_TRUE(guest_->map(0x45));
  for (int i = 0; i < 9; ++i) pins_of_guest_->scan();
  EXPECT_EQ(pins_of_guest_->counters().old_pages, 0u);
  pins_of_guest_->scan();
  EXPECT_EQ(pins_of_guest_->counters().old_pages, 1u);
  EXPECT_EQ(pins_of_guest_->counters().pinned_pages, 1u);
  EXPECT_TRUE(pins_of_guest_->is_pinned(0x45));
}

TEST_F(CoiommuPinsTest, PagesThatAreMappedAgainAndAgainAreAskedForOnce) {
  for (int round = 0; round < 1000; ++round) {
    for (uint64_t frame = 0x40; frame < 0x48; ++frame) ASSERT_TRUE(guest_->map(frame));
    for (uint64_t frame = 0x40; frame < 0x48; ++frame) guest_->unmap(frame);
    if (round % 100 == 99) pins_of_guest_->scan();
  }
  EXPECT_EQ(guest_->maps(), 8000u);
  EXPECT_EQ(guest_->notifications(), 8u);  // 99.9 % of maps without the host
  EXPECT_EQ(pins_of_guest_->counters().pins, 8u);
}

TEST_F(CoiommuPinsTest, AScanUnpinsNoMoreThanItMay) {
  Begin({.max_unpins_per_scan = 3});
  for (uint64_t frame = 0; frame < 200; ++frame) {
    ASSERT_TRUE(guest_->map(frame));
    guest_->unmap(frame);
  }
  pins_of_guest_->scan();
  const uint64_t flushes = target_->flushes;
  EXPECT_EQ(pins_of_guest_->scan(), 3u);
  EXPECT_EQ(target_->flushes, flushes + 1);
  EXPECT_EQ(pins_of_guest_->counters().pinned_pages, 197u);
  ExpectConsistent();
}

TEST_F(CoiommuPinsTest, WhileItIsParkedNothingGoes) {
  ASSERT_TRUE(guest_->map(0x45));
  guest_->unmap(0x45);
  device_->write(CoiommuDevice::kCommand, CoiommuDevice::kPark);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(pins_of_guest_->scan(), 0u);
  EXPECT_EQ(Word(0x45), 0xc000'0000u);
  device_->write(CoiommuDevice::kCommand, CoiommuDevice::kUnpark);
  pins_of_guest_->scan();
  EXPECT_EQ(pins_of_guest_->scan(), 1u);
}

TEST_F(CoiommuPinsTest, TheBalloonGetsWhatIsNotMapped) {
  ASSERT_TRUE(guest_->map(0x45));
  EXPECT_FALSE(pins_of_guest_->release_for_balloon(0x45));
  EXPECT_EQ(Word(0x45), 0x8000'0001u);
  EXPECT_EQ(Shown(), (std::set<uint64_t>{0x45}));
  guest_->unmap(0x45);
  ASSERT_TRUE(guest_->map(0x45));
  guest_->unmap(0x45);
  ASSERT_EQ(Word(0x45), 0xc000'0000u);
  EXPECT_TRUE(pins_of_guest_->release_for_balloon(0x45));
  EXPECT_EQ(Word(0x45), 0u);
  EXPECT_TRUE(Shown().empty());
  EXPECT_TRUE(pins_of_guest_->release_for_balloon(0x46));  // never pinned
  const auto counters = pins_of_guest_->counters();
  EXPECT_EQ(counters.forced, 1u);
  EXPECT_EQ(counters.in_use, 1u);
}

TEST_F(CoiommuPinsTest, BeyondTheLimitTheGuestsMapFailsAndCountsNothing) {
  Begin({.max_pinned_pages = 2});
  ASSERT_TRUE(guest_->map(1));
  ASSERT_TRUE(guest_->map(2));
  EXPECT_FALSE(guest_->map(3));
  EXPECT_EQ(Word(3), 0x4000'0000u);
  EXPECT_TRUE(guest_->map(1));  // pinned already
  guest_->unmap(2);
  pins_of_guest_->scan();
  pins_of_guest_->scan();
  EXPECT_TRUE(guest_->map(3));
  EXPECT_EQ(pins_of_guest_->counters().peak_pinned_pages, 2u);
  ExpectConsistent();
}

TEST_F(CoiommuPinsTest, WhatTheTargetOrTheMemoryRefusesIsNotPinned) {
  target_->fails_at = 5;
  EXPECT_FALSE(guest_->map(5));
  EXPECT_FALSE(guest_->map(0x500));  // not in memory
  ExpectConsistent();
  EXPECT_EQ(pins_of_guest_->counters().refused, 2u);
  target_->fails_at.reset();
  EXPECT_TRUE(guest_->map(5));
}

TEST_F(CoiommuPinsTest, MemoryThatMayOnlyBeReadIsShownSo) {
  ASSERT_THAT(container_.map(ram_.map_request(0x80'0000, 0x5000, 0x1000, Access::kRead)), IsOk());
  ASSERT_TRUE(guest_->map(0x800));
  EXPECT_EQ(target_->pages().at(0x800).access, Access::kRead);
  EXPECT_TRUE(pins_of_guest_->release_for_balloon(0x801));
  device_->write(CoiommuDevice::kCommand, CoiommuDevice::kDeactivate);
  ExpectConsistent();
}

TEST_F(CoiommuPinsTest, WhatTheVmmTakesAwayIsNotPinnedAnyMore) {
  Map(0x40'0000, 0x5000, 0x4000);
  ASSERT_TRUE(guest_->map(0x401));
  ASSERT_TRUE(guest_->map(0x45));
  ASSERT_THAT(container_.unmap(Iova(0x40'0000), 0x4000), IsOk());
  EXPECT_EQ(Word(0x401), 0x4000'0001u);
  EXPECT_EQ(Word(0x45), 0xc000'0001u);
  EXPECT_EQ(Shown(), (std::set<uint64_t>{0x45}));
  EXPECT_EQ(pins_of_guest_->counters().revoked, 1u);
  // The table itself goes: the guest has lost everything, and we nothing.
  ASSERT_THAT(container_.unmap(Iova(0), 0x40'0000), IsOk());
  ExpectConsistent();
  EXPECT_EQ(pins_of_guest_->counters().pinned_pages, 0u);
  EXPECT_THAT(pins_of_guest_->pin(0x45), FailsWith(ErrorCode::kNotMapped));
  EXPECT_EQ(pins_of_guest_->scan(), 0u);
}

TEST_F(CoiommuPinsTest, WhatCannotBeMarkedIsNotPinned) {
  guest_->prepare(5, 1);
  // The same words, where they may only be read.
  Map(0x40'0000, kTables, 0x10'0000, Access::kRead);
  pins_of_guest_->deactivate();
  for (uint64_t table = kTables; table < kTables + 0x3000; table += 0x1000) {
    ram_.put(table, ram_.get<uint64_t>(table) + 0x40'0000 - kTables);
  }
  ASSERT_THAT(pins_of_guest_->activate(TrackingTable(domain_.get(), kTables, 4)), IsOk());
  EXPECT_THAT(pins_of_guest_->pin(5), FailsWith(ErrorCode::kPermission));
  EXPECT_FALSE(pins_of_guest_->is_pinned(5));
  ExpectConsistent();
}

// An unmap that the VMM begins and does not get: nothing can be read there meanwhile.
TEST_F(CoiommuPinsTest, ATableThatCannotBeReadForAMomentSaysNothing) {
  Map(0x40'0000, 0x5000, 0x4000);
  ASSERT_TRUE(guest_->map(0x401));
  owner_.held.emplace(*Pin(0x1000, 0x1000));
  owner_.lets_go = false;
  std::optional<uint64_t> gone;
  std::optional<bool> released;
  owner_.during_revoke = [&] {
    gone = pins_of_guest_->scan();
    released = pins_of_guest_->release_for_balloon(0x401);
  };
  EXPECT_THAT(container_.unmap(Iova(0), 0x40'0000), FailsWith(ErrorCode::kBusy));
  EXPECT_EQ(gone, 0u);
  EXPECT_EQ(released, false);
  EXPECT_TRUE(pins_of_guest_->is_pinned(0x401));
  EXPECT_EQ(Word(0x401), 0xc000'0001u);
}

TEST_F(CoiommuPinsTest, DeactivatingUnpinsAllAndSaysSo) {
  ASSERT_TRUE(guest_->map(1));
  ASSERT_TRUE(guest_->map(2));
  for (int i = 0; i < 12; ++i) pins_of_guest_->scan();
  ASSERT_TRUE(guest_->map(3));
  pins_of_guest_->deactivate();
  for (const uint64_t frame : {1, 2, 3}) EXPECT_EQ(Word(frame) & 0x8000'ffff, 1u);
  EXPECT_TRUE(Shown().empty());
  EXPECT_THAT(pins_of_guest_->pin(4), FailsWith(ErrorCode::kInvalid));
  EXPECT_EQ(pins_of_guest_->scan(), 0u);
  EXPECT_THAT(pins_of_guest_->activate(TrackingTable(domain_.get(), kTables, 4)), IsOk());
  EXPECT_THAT(pins_of_guest_->activate(TrackingTable(domain_.get(), kTables, 4)),
              FailsWith(ErrorCode::kBusy));
  EXPECT_TRUE(guest_->map(4));
}

TEST_F(CoiommuPinsTest, CountsEndBeforeTheyWrap) {
  EXPECT_EQ(guest_->most_maps(), 0xffefu);  // 16 vCPUs
  guest_->word(1).store(0xc000'0000 | 0xffee);
  EXPECT_TRUE(guest_->map(1));
  EXPECT_FALSE(guest_->map(1));
  EXPECT_EQ(Word(1) & 0xffff, 0xffefu);
}

}  // namespace
}  // namespace mvgpu::domain
