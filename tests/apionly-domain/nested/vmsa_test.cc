#include <array>

#include "apionly-domain/nested/vmsa_stage1.h"
#include "apionly-domain/nested/vmsa_stage2.h"
#include "tests/apionly-domain/nested/tables_fixture.h"

namespace mvgpu::domain {
namespace {

// The tables of the vectors: stage 1 at 0xa0000000, stage 2 at 0x90000000, 39 bits both.
class VmsaTest : public TablesTest {
 protected:
  static constexpr uint64_t kVa = 0x20'1234'5678;
  static constexpr uint64_t kRoot1 = 0xa000'0000;
  static constexpr uint64_t kRoot2 = 0x9000'0000;
  static constexpr uint64_t kLeafAt = 0xa000'2a28;
  static constexpr uint64_t kPage2At = 0x9000'2000 + 0x78 * 8;

  void SetUp() override {
    TablesTest::SetUp();
    Window(kRoot1, 0);
    Window(kRoot2, 1);
    Put(0xa000'0400, 0xa000'1003);
    Put(0xa000'1488, 0xa000'2003);
    Put(kLeafAt, 0x0060'0000'4567'8f43);
    // IPA 0x45678000 as a page, 0x45800000 as a block of 2 MiB.
    Put(0x9000'0000 + 1 * 8, 0x9000'1003);
    Put(0x9000'1000 + 0x2b * 8, 0x9000'2003);
    Put(kPage2At, 0x8'4567'87ff);
    Put(0x9000'1000 + 0x2c * 8, 0x8'4560'07fd);
  }
  WalkResult Walk1(Wanted wanted, VmsaStage1Format::Options options = {.t0sz = 25}) {
    return VmsaStage1({options}, tables_.get()).walk(kRoot1, kVa, wanted);
  }
  WalkResult Walk2(uint64_t address, Wanted wanted,
                   VmsaStage2Format::Options options = {.t0sz = 25, .output_bits = 40}) {
    return VmsaStage2({options}, tables_.get()).walk(kRoot2, address, wanted);
  }
};

using VmsaStage1Test = VmsaTest;
using VmsaStage2Test = VmsaTest;

constexpr uint64_t kAf = 1 << 10;
constexpr uint64_t kDbm = uint64_t{1} << 51;
constexpr vmsa::FlagOptions kHardwareFlags{.sets_access_flag = true, .sets_dirty = true};

TEST_F(VmsaStage1Test, VectorWalk) {
  ExpectLeaf(Walk1(Access::kReadWrite), {0x4567'8678, 4096, kReadWrite});
}

TEST_F(VmsaStage1Test, TheFirstLevelFollowsFromTheWidth) {
  Put(0xa000'8000, 0xa000'0003);  // of 48 bits: a level above
  const VmsaStage1 wide({{.t0sz = 16}}, tables_.get());
  ExpectLeaf(wide.walk(0xa000'8000, kVa, Access::kRead), {0x4567'8678, 4096, kReadWrite});
  EXPECT_FALSE(Walk1(Access::kRead, {.t0sz = 27}));
  const VmsaStage1 narrow({{.t0sz = 39}}, tables_.get());  // 25 bits: two levels
  Put(0xa000'9000 + 9 * 8, 0xa000'2003);
  ExpectLeaf(narrow.walk(0xa000'9000, 0x134'5678, Access::kRead), {0x4567'8678, 4096, kReadWrite});
  ExpectFault(narrow.walk(0xa000'9000, 0x200'0000, Access::kRead), FaultCode::kInputRange, 0);
}

TEST_F(VmsaStage1Test, WidthsThatDoNotExistAreRefused) {
  for (const uint8_t t0sz : {uint8_t{15}, uint8_t{40}, uint8_t{63}}) {
    const auto result = Walk1(Access::kRead, {.t0sz = t0sz});
    ExpectFault(result, FaultCode::kBadRoot, 0);
    EXPECT_EQ(SmmuEventType(result.error()), 0xa);
  }
}

TEST_F(VmsaStage1Test, AddressesBeyondTheWidthAreTranslationFaults) {
  const VmsaStage1 walker({{.t0sz = 25}}, tables_.get());
  const auto result = walker.walk(kRoot1, uint64_t{1} << 39, Access::kRead);
  ExpectFault(result, FaultCode::kInputRange, 0);
  EXPECT_EQ(SmmuEventType(result.error()), 0x10);
  EXPECT_EQ(SmmuEventClass(result.error()), 2);
}

TEST_F(VmsaStage1Test, BlocksOf2MAnd1G) {
  Put(0xa000'1488, 0x5540'0000 | 0x741);
  ExpectLeaf(Walk1(Access::kRead), {0x5540'0000 + 0x14'5678, kTwoMiB, kAllRights});
  Put(0xa000'0400, 0x8000'0000 | 0x741);
  ExpectLeaf(Walk1(Access::kRead), {0x8000'0000 + 0x1234'5678, kOneGiB, kAllRights});
}

TEST_F(VmsaStage1Test, ReservedEncodingsAreNotValid) {
  Put(kLeafAt, 0x4567'8f41);  // 01 at the last level
  ExpectFault(Walk1(Access::kRead), FaultCode::kNotPresent, 0);
  Put(0xa000'8000, 0xa000'0741);  // a block at Arm's level 0
  const VmsaStage1 wide({{.t0sz = 16}}, tables_.get());
  ExpectFault(wide.walk(0xa000'8000, kVa, Access::kRead), FaultCode::kNotPresent, 3);
}

TEST_F(VmsaStage1Test, TheAccessFlagOutranksPermissions) {
  Put(kLeafAt, (0x4567'8fc3 & ~kAf));  // read-only, and not accessed
  const auto result = Walk1(Access::kWrite);
  ExpectFault(result, FaultCode::kAccessFlag, 0);
  EXPECT_EQ(SmmuEventType(result.error()), 0x12);
  const auto ignored = Walk1(Access::kWrite, {.t0sz = 25, .flags = {.ignores_access_flag = true}});
  ExpectFault(ignored, FaultCode::kNoWrite, 0);
  EXPECT_EQ(SmmuEventType(ignored.error()), 0x13);
}

TEST_F(VmsaStage1Test, HardwareThatKeepsTheAccessFlagSetsIt) {
  Put(kLeafAt, 0x4567'8f43 & ~kAf);
  EXPECT_TRUE(Walk1(Access::kRead, {.t0sz = 25, .flags = {.sets_access_flag = true}}));
  EXPECT_EQ(Get(kLeafAt), 0x4567'8f43);
}

TEST_F(VmsaStage1Test, HardwareThatKeepsDirtyMakesTheEntryWritable) {
  Put(kLeafAt, kDbm | 0x4567'8fc3);
  ExpectFault(Walk1(Access::kWrite), FaultCode::kNoWrite, 0);
  EXPECT_TRUE(Walk1(Access::kRead, {.t0sz = 25, .flags = kHardwareFlags}));
  EXPECT_EQ(Get(kLeafAt), kDbm | 0x4567'8fc3);
  EXPECT_TRUE(Walk1(Access::kWrite, {.t0sz = 25, .flags = kHardwareFlags}));
  EXPECT_EQ(Get(kLeafAt), kDbm | 0x4567'8f43);
}

TEST_F(VmsaStage1Test, PermissionsOfUsersAndSupervisors) {
  struct Case {
    uint64_t ap;  // AP[2:1]
    Rights user, supervisor;
  };
  for (const Case& c :
       {Case{0, 0, kAllRights}, Case{1, kAllRights, kAllRights}, Case{2, 0, kMayRead | kMayExecute},
        Case{3, kMayRead | kMayExecute, kMayRead | kMayExecute}}) {
    Put(kLeafAt, 0x4567'8f03 | c.ap << 6);
    ExpectLeaf(Walk1({}), {0x4567'8678, 4096, c.user});
    ExpectLeaf(Walk1(Wanted(0, true)), {0x4567'8678, 4096, c.supervisor});
    EXPECT_EQ(Walk1(Access::kRead).has_value(), (c.user & kMayRead) != 0);
    EXPECT_EQ(Walk1(Access::kWrite).has_value(), (c.user & kMayWrite) != 0);
  }
}

TEST_F(VmsaStage1Test, TablesTakeRightsFromEverythingBelow) {
  Put(kLeafAt, 0x4567'8f43);
  for (const uint64_t at : {0xa000'0400, 0xa000'1488}) {
    const uint64_t entry = Get(at);
    Put(at, entry | uint64_t{1} << 62);  // APTable[1]
    ExpectLeaf(Walk1({}), {0x4567'8678, 4096, kMayRead | kMayExecute});
    Put(at, entry | uint64_t{1} << 61);  // APTable[0]
    ExpectLeaf(Walk1({}), {0x4567'8678, 4096, 0});
    ExpectLeaf(Walk1(Wanted(0, true)), {0x4567'8678, 4096, kAllRights});
    Put(at, entry | uint64_t{1} << 60);  // XNTable
    ExpectLeaf(Walk1({}), {0x4567'8678, 4096, kReadWrite});
    Put(at, entry);
  }
}

TEST_F(VmsaStage1Test, AddressesBeyondTheOutputSizeAreAddressSizeFaults) {
  Put(kLeafAt, uint64_t{1} << 40 | 0x4567'8f43);
  const auto leaf = Walk1(Access::kRead, {.t0sz = 25, .output_bits = 40});
  ExpectFault(leaf, FaultCode::kOutputRange, 0);
  EXPECT_EQ(SmmuEventType(leaf.error()), 0x11);
  Put(0xa000'1488, uint64_t{1} << 40 | 0xa000'2003);
  ExpectFault(Walk1(Access::kRead, {.t0sz = 25, .output_bits = 40}), FaultCode::kOutputRange, 1);
  ExpectFault(Walk1(Access::kRead, {.t0sz = 25, .output_bits = 31}), FaultCode::kOutputRange, 0);
}

TEST_F(VmsaStage1Test, TheContiguousHintIsNotReliedOn) {
  const uint64_t hint = uint64_t{1} << 52;
  const VmsaStage1 walker({{.t0sz = 25}}, tables_.get());
  const uint64_t first = kVa & ~uint64_t{0xffff};
  for (uint64_t i = 0; i < 16; ++i) {
    const uint64_t frame = i == 7 ? 0x7777'0000 : 0x4567'0000 + BytesIn(i);  // one is a lie
    Put(0xa000'2a00 + i * 8, hint | frame | 0xf43);
  }
  std::array<PageWord, 16> words;
  EXPECT_EQ(walker.walk_pages(kRoot1, first, words).pages, 16);
  EXPECT_EQ(words[6], 0x4567'6003);
  EXPECT_EQ(words[7], 0x7777'0003);
  ExpectLeaf(walker.walk(kRoot1, first + 0x7123, Access::kRead), {0x7777'0123, 4096, kAllRights});
}

TEST_F(VmsaStage1Test, TablesOutsideOfMemoryAreWalkAborts) {
  Put(0xa000'1488, 0x1234'0000'0003);
  const auto result = Walk1(Access::kRead);
  ExpectFault(result, FaultCode::kTableAccess, 0);
  EXPECT_EQ(SmmuEventType(result.error()), 0xb);
}

TEST_F(VmsaStage2Test, VectorPageAndBlock) {
  ExpectLeaf(Walk2(0x4567'8678, Access::kReadWrite), {0x8'4567'8678, 4096, kAllRights});
  ExpectLeaf(Walk2(0x4587'8678, Access::kReadWrite), {0x8'4567'8678, kTwoMiB, kAllRights});
}

TEST_F(VmsaStage2Test, PermissionsAreTheLeafsOwn) {
  for (const uint64_t ap : {0, 1, 2, 3}) {
    Put(kPage2At, 0x8'4567'873f | ap << 6);
    EXPECT_EQ(Walk2(0x4567'8678, Access::kRead).has_value(), (ap & 1) != 0);
    EXPECT_EQ(Walk2(0x4567'8678, Access::kWrite).has_value(), (ap & 2) != 0);
  }
  Put(kPage2At, uint64_t{1} << 54 | 0x8'4567'87ff);
  ExpectFault(Walk2(0x4567'8678, Wanted(kMayExecute, false)), FaultCode::kNoExecute, 0);
}

TEST_F(VmsaStage2Test, FlagsAreKeptByHardwareWhereItIsToldTo) {
  Put(kPage2At, kDbm | (0x8'4567'877f & ~kAf));  // readable, DBM, not accessed
  const auto result = Walk2(0x4567'8678, Access::kRead);
  ExpectFault(result, FaultCode::kAccessFlag, 0);
  EXPECT_EQ(result.error().stage, 2);
  EXPECT_TRUE(
      Walk2(0x4567'8678, Access::kWrite, {.t0sz = 25, .output_bits = 40, .flags = kHardwareFlags}));
  EXPECT_EQ(Get(kPage2At), kDbm | 0x8'4567'87ff);
}

TEST_F(VmsaStage2Test, TablesOfTheFirstLevelLieOneBehindTheOther) {
  // 40 bits from Arm's level 1 on: two tables.
  Put(kRoot2 + 0x4000 + 513 * 8, 0x9000'1003);
  const VmsaStage2 walker({{.t0sz = 24, .sl0 = 1, .output_bits = 40}}, tables_.get());
  ExpectLeaf(walker.walk(kRoot2 + 0x4000, (uint64_t{513} << 30) + 0x0567'8678, Access::kRead),
             {0x8'4567'8678, 4096, kAllRights});
  ExpectFault(walker.walk(kRoot2 + 0x4000, uint64_t{1} << 40, Access::kRead),
              FaultCode::kInputRange, 0);
}

TEST_F(VmsaStage2Test, FirstLevelsThatDoNotFitTheWidthAreRefused) {
  for (const VmsaStage2Format::Options& options :
       {VmsaStage2Format::Options{.t0sz = 25, .sl0 = 3},
        VmsaStage2Format::Options{.t0sz = 16, .sl0 = 1},
        VmsaStage2Format::Options{.t0sz = 30, .sl0 = 2},
        VmsaStage2Format::Options{.t0sz = 34, .sl0 = 1}}) {
    const auto result = Walk2(0, Access::kRead, options);
    ExpectFault(result, FaultCode::kBadRoot, 0);
    EXPECT_EQ(SmmuEventType(result.error()), 0x4);
  }
}

TEST_F(VmsaStage2Test, AddressesBeyondThePhysicalSizeAreAddressSizeFaults) {
  Put(kPage2At, uint64_t{1} << 41 | 0x8'4567'87ff);
  ExpectFault(Walk2(0x4567'8678, Access::kRead), FaultCode::kOutputRange, 0);
}

TEST(VmsaSizesTest, EachCodeHasItsBits) {
  EXPECT_EQ(vmsa::SizeBits(0), 32);
  EXPECT_EQ(vmsa::SizeBits(2), 40);
  EXPECT_EQ(vmsa::SizeBits(6), 52);
  EXPECT_EQ(vmsa::SizeBits(7), std::nullopt);
}

}  // namespace
}  // namespace mvgpu::domain
