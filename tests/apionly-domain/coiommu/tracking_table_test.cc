#include "apionly-domain/coiommu/tracking_table.h"

#include "tests/apionly-domain/domain_fixture.h"

namespace mvgpu::domain {
namespace {

using testing::FailsWith;
using testing::IsOk;
using testing::IsOkAndHolds;

TEST(TrackingTableLayoutTest, LevelsFollowTheWidthOfAddresses) {
  EXPECT_EQ(TrackingTable::LevelsFor(46), 4u);
  EXPECT_EQ(TrackingTable::LevelsFor(48), 4u);
  EXPECT_EQ(TrackingTable::LevelsFor(49), 4u);
  EXPECT_EQ(TrackingTable::LevelsFor(50), 5u);
  EXPECT_EQ(TrackingTable::LevelsFor(52), 5u);
}

TEST(TrackingTableLayoutTest, TheIndexesOfTheSeed) {
  EXPECT_EQ(TrackingTable::IndexOf(0x12345, 3), 0u);
  EXPECT_EQ(TrackingTable::IndexOf(0x12345, 2), 0u);
  EXPECT_EQ(TrackingTable::IndexOf(0x12345, 1), 0x48u);
  EXPECT_EQ(TrackingTable::IndexOf(0x12345, 0), 0x345u);
}

class TrackingTableTest : public DomainTest {
 protected:
  static constexpr uint64_t kRoot = 0x1'0000;

  void SetUp() override {
    DomainTest::SetUp();
    Map(0, 0, 0x10'0000);
    ram_.put(kRoot, uint64_t{0x1'1001});
    ram_.put(uint64_t{0x1'1000}, uint64_t{0x1'2001});
    ram_.put(uint64_t{0x1'2000 + 0x48 * 8}, uint64_t{0x1'3001});
  }
  TrackingTable Table() { return {domain_.get(), kRoot, 4}; }
  static constexpr uint64_t kWord = 0x1'3000 + 0x345 * 4;
};

TEST_F(TrackingTableTest, AFramesWordIsFound) {
  EXPECT_THAT(Table().find(0x12345), IsOkAndHolds(Iova(kWord)));
  EXPECT_THAT(Table().find(0x12344), IsOkAndHolds(Iova(kWord - 4)));
  // The root is of whole pages, whatever else the guest writes there.
  EXPECT_THAT(TrackingTable(domain_.get(), kRoot + 0xff8, 4).find(0x12345),
              IsOkAndHolds(Iova(kWord)));
}

TEST_F(TrackingTableTest, WhatIsNotThereIsAnError) {
  EXPECT_THAT(Table().find(0x12345 + 0x400), FailsWith(ErrorCode::kNotMapped));
  EXPECT_THAT(Table().find(uint64_t{1} << 37), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(Table().find(UINT64_MAX), FailsWith(ErrorCode::kInvalid));
  ram_.put(uint64_t{0x1'1000}, uint64_t{0x4000'0001});
  EXPECT_THAT(Table().find(0x12345), FailsWith(ErrorCode::kNotMapped));
  ram_.put(uint64_t{0x1'1000}, uint64_t{0xffff'ffff'ffff'f001});
  EXPECT_THAT(Table().find(0x12345), FailsWith(ErrorCode::kNotMapped));
}

TEST_F(TrackingTableTest, AWordIsChangedAndNotItsNeighbour) {
  for (const uint64_t at : {kWord, kWord - 4}) {
    ram_.put(kWord - 4, uint64_t{0x2222'2222'1111'1111});
    ram_.put(kWord, uint64_t{0x4444'4444'3333'3333});
    const auto there = ram_.get<uint32_t>(at);
    EXPECT_THAT(Table().load(Iova(at)), IsOkAndHolds(there));
    EXPECT_THAT(Table().compare_exchange(Iova(at), 7, 8), IsOkAndHolds(there));
    EXPECT_EQ(ram_.get<uint32_t>(at), there);
    EXPECT_THAT(Table().compare_exchange(Iova(at), there, 8), IsOkAndHolds(there));
    EXPECT_EQ(ram_.get<uint32_t>(at), 8u);
    EXPECT_THAT(Table().change(Iova(at), 8, 0x8000'0001), IsOkAndHolds(8u));
    EXPECT_EQ(ram_.get<uint32_t>(at), 0x8000'0001u);
    EXPECT_EQ(ram_.get<uint32_t>(at ^ 4), at == kWord ? 0x1111'1111u : 0x3333'3333u);
  }
}

TEST_F(TrackingTableTest, MemoryThatMayNotBeWrittenIsNotChanged) {
  Map(0x20'0000, 0x1'3000, 0x1000, Access::kRead);
  EXPECT_THAT(Table().load(Iova(0x20'0000)), IsOk());
  EXPECT_THAT(Table().change(Iova(0x20'0000), 0, 1), FailsWith(ErrorCode::kPermission));
  EXPECT_THAT(Table().load(Iova(0x30'0000)), FailsWith(ErrorCode::kNotMapped));
}

}  // namespace
}  // namespace mvgpu::domain
