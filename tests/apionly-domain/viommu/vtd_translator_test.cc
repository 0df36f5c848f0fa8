// What a PASID entry of each type says about an address.

#include "tests/apionly-domain/viommu/viommu_fixture.h"

namespace mvgpu::domain {
namespace {

class VtdTranslatorTest : public VtdIommuTest {
 protected:
  VtdResult Walk(uint64_t address, Wanted wanted = Access::kRead) {
    return iommu_->walk(Request(address, wanted));
  }
};

TEST_F(VtdTranslatorTest, NestedVector) {
  EXPECT_EQ(Walk(kGva, Access::kReadWrite),
            (VtdTarget{0x10'0567'8abc, kPageSize - 0xabc, kReadWrite}));
}

TEST_F(VtdTranslatorTest, FirstStageAlone) {
  PutEntry(kEntryAt, kFirstOnly, 0x42, 0x40'0000);
  EXPECT_EQ(Walk(kGva, Access::kReadWrite), (VtdTarget{kGpa, kPageSize - 0xabc, kReadWrite}));
  Put(0x40'2d10, 0x1234'0000'00e7);  // 2 MiB
  const uint64_t offset = kGva & (kTwoMiB - 1);
  EXPECT_EQ(Walk(kGva),
            (VtdTarget{0x1234'0000'0000 + offset, kTwoMiB - offset, kAllRights, kTwoMiB}));
}

TEST_F(VtdTranslatorTest, SecondStageAlone) {
  PutEntry(kEntryAt, kSecondOnly, 0x42, 0);
  EXPECT_EQ(Walk(kGpa), (VtdTarget{0x10'0567'8abc, kPageSize - 0xabc, kReadWrite}));
  EXPECT_EQ(Walk(0x40'0008), (VtdTarget{0x10'0040'0008, kTwoMiB - 8, kReadWrite, kTwoMiB}));
  ExpectRefused(Walk(kGva), 0x79);
  ExpectRefused(Walk(uint64_t{1} << 48), 0x84);
}

TEST_F(VtdTranslatorTest, WidthsOfTheSecondStage) {
  PutEntry(kEntryAt, 0x30'1085, 0x42, 0);  // 39 bits: from the second level on
  ExpectTarget(Walk(kGpa), kGpa + kOffset);
  ExpectRefused(Walk(uint64_t{1} << 39), 0x84);
  Put(0x30'4000 + 3 * 8, 0x30'0003);
  PutEntry(kEntryAt, 0x30'408d, 0x42, 0);  // 57 bits
  ExpectTarget(Walk(uint64_t{3} << 48 | kGpa), kGpa + kOffset);
}

TEST_F(VtdTranslatorTest, FiveLevelsOfTheFirstStage) {
  Put(0x40'8000 + 0x12 * 8, 0x40'0027);
  PutEntry(kEntryAt, kFirstOnly, 0x42, 0x40'8004);
  ExpectTarget(Walk(uint64_t{0x12} << 48 | kGva), kGpa);
  PutEntry(kEntryAt, kNested, 0x42, 0x40'8004);
  ExpectTarget(Walk(uint64_t{0x12} << 48 | kGva), kGpa + kOffset);
}

TEST_F(VtdTranslatorTest, PassThrough) {
  PutEntry(kEntryAt, kPassThrough, 0x42, 0);
  EXPECT_EQ(Walk(kGpa), (VtdTarget{kGpa, kOneGiB - kGpa, kAllRights, kOneGiB}));
  ExpectTarget(Walk((uint64_t{1} << 46) - 1), (uint64_t{1} << 46) - 1);
  ExpectRefused(Walk(uint64_t{1} << 46), 0x83);
  ExpectRefused(Walk(0xfee0'0000), 0x87);
  ExpectRefused(Walk(0xfeef'ffff), 0x87);
  EXPECT_EQ(Walk(0xfedf'f000)->length, 0x1000);
  EXPECT_EQ(Walk(0xfef0'0000)->length, 0x10'0000);
}

TEST_F(VtdTranslatorTest, LengthsEndWhereInterruptsBegin) {
  PutEntry(kEntryAt, kSecondOnly, 0x42, 0);
  Put(0x30'2000 + 2 * 8, 0xfee0'0083);  // 2 MiB, the lower half interrupts
  ExpectRefused(Walk(0x40'0000), 0x87);
  EXPECT_EQ(Walk(0x50'0000)->length, 0x10'0000);
  Put(0x30'1000, 0xc000'0083);  // 1 GiB
  EXPECT_EQ(Walk(0x3ed0'0000)->length, 0x10'0000);
  ExpectRefused(Walk(0x3ee0'0000), 0x87);
}

TEST_F(VtdTranslatorTest, FaultsSayWhichStageAndWhatWentIntoIt) {
  Put(kFirstLeafAt, 0);
  auto result = Walk(kGva);
  ExpectRefused(result, 0x71);
  EXPECT_EQ(result.error().stage, 1);
  EXPECT_EQ(result.error().stage_input, kGva);
  Put(kFirstLeafAt, 0x567'9067);
  result = Walk(kGva);
  ExpectRefused(result, 0x79);
  EXPECT_EQ(result.error().stage, 2);
  EXPECT_EQ(result.error().stage_input, 0x567'9abc);
  EXPECT_EQ(result.error().address, kGva);
  Put(0x40'1240, 0x9a'b027);  // a table where the second stage has nothing
  result = Walk(kGva);
  ExpectRefused(result, 0x79);
  EXPECT_EQ(result.error().stage_input, 0x9a'b000 + 0x1a2 * 8);
  EXPECT_EQ(result.error().address, kGva);
}

TEST_F(VtdTranslatorTest, RightsOfBothStagesCount) {
  Put(kSecondLeafAt, 0x10'0567'8001);
  EXPECT_EQ(Walk(kGva)->rights, kMayRead);
  ExpectRefused(Walk(kGva, Access::kWrite), 0x85);
  Put(kSecondLeafAt, 0x10'0567'8003);
  Put(kFirstLeafAt, 0x567'8065);
  ExpectRefused(Walk(kGva, Access::kWrite), 0x85);
}

TEST_F(VtdTranslatorTest, WriteProtectBindsSupervisors) {
  Put(kFirstLeafAt, 0x567'8065);
  const Wanted supervisor(kReadWrite, true);
  Put(kEntryAt + 16, 0x40'0001);
  EXPECT_TRUE(Walk(kGva, supervisor));
  Put(kEntryAt + 16, 0x40'0011);
  ExpectRefused(Walk(kGva, supervisor), 0x85);
}

TEST_F(VtdTranslatorTest, AccessedOfTheSecondStageIsKeptIfTheEntrySaysSo) {
  EXPECT_TRUE(Walk(kGva, Access::kWrite));
  EXPECT_EQ(Get(kSecondLeafAt), 0x10'0567'8003);
  Put(kEntryAt, kNested | 1 << 9);
  EXPECT_TRUE(Walk(kGva, Access::kWrite));
  EXPECT_EQ(Get(kSecondLeafAt), 0x10'0567'8303);
}

TEST_F(VtdTranslatorTest, AddressesBeyondTheHostAreReserved) {
  PutEntry(kEntryAt, kFirstOnly, 0x42, 0x40'0000);
  Put(kFirstLeafAt, uint64_t{1} << 46 | 0x67);
  ExpectRefused(Walk(kGva), 0x72);
  PutEntry(kEntryAt, kNested, 0x42, 0x40'0000);
  ExpectRefused(Walk(kGva), 0x79);  // a guest-physical address as any other
  Put(kFirstLeafAt, uint64_t{1} << 50 | 0x67);
  ExpectRefused(Walk(kGva), 0x84);
  Put(kFirstLeafAt, 0x567'8067);
  Put(kSecondLeafAt, uint64_t{1} << 46 | 3);
  ExpectRefused(Walk(kGva), 0x7a);
  PutEntry(kEntryAt, kSecondOnly | uint64_t{1} << 46, 0x42, 0);
  ExpectRefused(Walk(kGpa), 0x7b);
  PutEntry(kEntryAt, kFirstOnly, 0x42, uint64_t{1} << 46);
  ExpectRefused(Walk(kGva), 0x73);
}

}  // namespace
}  // namespace mvgpu::domain
