#include <array>

#include "apionly-domain/nested/two_stage.h"
#include "apionly-domain/nested/vtd_first_stage.h"
#include "apionly-domain/nested/vtd_second_stage.h"
#include "tests/apionly-domain/nested/tables_fixture.h"

namespace mvgpu::domain {
namespace {

// The tables of the vectors: first stage at 0x400000, second stage at 0x300000.
class VtdTest : public TablesTest {
 protected:
  static constexpr uint64_t kGva = 0x7f12'3456'7abc;
  static constexpr uint64_t kFirstRoot = 0x40'0000;
  static constexpr uint64_t kSecondRoot = 0x30'0000;
  static constexpr uint64_t kOffset = 0x10'0000'0000;  // of the second stage
  static constexpr uint64_t kLeafAt = 0x40'3b38;

  void SetUp() override {
    TablesTest::SetUp();
    Window(kFirstRoot, 0);
    Window(kFirstRoot + kOffset, 0);  // through the second stage
    Window(kSecondRoot, 1);
    Put(0x40'07f0, 0x40'1027);
    Put(0x40'1240, 0x40'2027);
    Put(0x40'2d10, 0x40'3027);
    Put(kLeafAt, 0x8000'0000'0567'8067);
    // GPA 0x5678000 as a 4 KiB page, 0x400000 as one of 2 MiB.
    Put(0x30'0000, 0x30'1003);
    Put(0x30'1000, 0x30'2003);
    Put(0x30'2000 + 2 * 8, 0x10'0040'0083);
    Put(0x30'2000 + 0x2b * 8, 0x30'3003);
    Put(0x30'3000 + 0x78 * 8, 0x10'0567'8003);
  }
  VtdFirstStage First(VtdFirstStageFormat::Options options = {}) {
    return {VtdFirstStageFormat{options}, tables_.get()};
  }
  VtdSecondStage Second(VtdSecondStageFormat::Options options = {}) {
    return {VtdSecondStageFormat{options}, tables_.get()};
  }
  static uint8_t Reason(const WalkResult& result, VtdMode mode, bool is_write = false) {
    return result ? 0 : VtdFaultReason(result.error(), mode, is_write);
  }
};

using VtdFirstStageTest = VtdTest;
using VtdSecondStageTest = VtdTest;
using VtdNestedTest = VtdTest;

TEST_F(VtdFirstStageTest, VectorWalk) {
  ExpectLeaf(First().walk(kFirstRoot, kGva, Access::kReadWrite), {0x567'8abc, 4096, kReadWrite});
}

TEST_F(VtdFirstStageTest, VectorLeafIsNotExecutable) {
  const auto result = First().walk(kFirstRoot, kGva, Wanted(kMayExecute, false));
  ExpectFault(result, FaultCode::kNoExecute, 0);
  EXPECT_EQ(Reason(result, VtdMode::kFirstStage), 0x82);
  Put(kLeafAt, 0x567'8067);
  ExpectLeaf(First().walk(kFirstRoot, kGva, Wanted(kMayExecute, false)),
             {0x567'8abc, 4096, kAllRights});
}

TEST_F(VtdFirstStageTest, AccessedIsSetAtEveryLevelAndDirtyByAWrite) {
  const std::array<uint64_t, 4> entries{0x40'07f0, 0x40'1240, 0x40'2d10, kLeafAt};
  for (const uint64_t at : entries) Put(at, Get(at) & ~uint64_t{0x60});
  ExpectLeaf(First().walk(kFirstRoot, kGva, Wanted()), {0x567'8abc, 4096, kReadWrite});
  for (const uint64_t at : entries) EXPECT_EQ(Get(at) & 0x60, 0) << "asking leaves no mark";
  EXPECT_TRUE(First().walk(kFirstRoot, kGva, Access::kRead));
  for (const uint64_t at : entries) EXPECT_EQ(Get(at) & 0x60, 0x20) << std::hex << at;
  EXPECT_TRUE(First().walk(kFirstRoot, kGva, Access::kWrite));
  EXPECT_EQ(Get(kLeafAt) & 0x60, 0x60);
  EXPECT_EQ(Get(0x40'2d10) & 0x60, 0x20) << "dirty is for leaves";
}

TEST_F(VtdFirstStageTest, ARefusedRequestMarksNoPage) {
  Put(kLeafAt, 0x567'8005);  // read-only, for users
  const auto result = First().walk(kFirstRoot, kGva, Access::kWrite);
  ExpectFault(result, FaultCode::kNoWrite, 0);
  EXPECT_EQ(Reason(result, VtdMode::kFirstStage, true), 0x85);
  EXPECT_EQ(Get(kLeafAt), 0x567'8005);
}

TEST_F(VtdFirstStageTest, UserRequestsNeedUserAtEveryLevel) {
  for (const uint64_t at : {0x40'07f0, 0x40'1240, 0x40'2d10, 0x40'3b38}) {
    const uint64_t entry = Get(at);
    Put(at, entry & ~uint64_t{4});
    const auto result = First().walk(kFirstRoot, kGva, Access::kRead);
    ExpectFault(result, FaultCode::kNotForUser, 0);
    EXPECT_EQ(Reason(result, VtdMode::kFirstStage), 0x81);
    EXPECT_TRUE(First().walk(kFirstRoot, kGva, Wanted(kReadWrite, /*as_supervisor=*/true)));
    Put(at, entry);
  }
}

TEST_F(VtdFirstStageTest, WriteProtectBindsSupervisors) {
  Put(kLeafAt, 0x567'8065);
  const Wanted supervisor(kReadWrite, true);
  EXPECT_TRUE(First().walk(kFirstRoot, kGva, supervisor));
  ExpectFault(First({.write_protect = true}).walk(kFirstRoot, kGva, supervisor),
              FaultCode::kNoWrite, 0);
}

TEST_F(VtdFirstStageTest, AddressesMustBeCanonical) {
  for (const uint64_t address : {uint64_t{0x8000'0000'0000}, uint64_t{0xffff'7fff'ffff'ffff}}) {
    const auto result = First().walk(kFirstRoot, address, Access::kRead);
    ExpectFault(result, FaultCode::kInputRange, 0);
    EXPECT_EQ(Reason(result, VtdMode::kFirstStage), 0x80);
  }
  Put(kFirstRoot + 0x1ff * 8, 0x40'1027);
  ExpectLeaf(First().walk(kFirstRoot, 0xffff'ff92'3456'7abc, Access::kRead),
             {0x567'8abc, 4096, kReadWrite});
}

TEST_F(VtdFirstStageTest, WhatIsNotCanonicalEndsAtTheUpperHalf) {
  std::array<PageWord, 8> words;
  const Stretch stretch = First().walk_pages(kFirstRoot, 0x8000'0000'0000, words);
  ASSERT_TRUE(stretch.fault);
  EXPECT_EQ(0x8000'0000'0000 + BytesIn(stretch.fault_pages), 0xffff'8000'0000'0000);
}

TEST_F(VtdFirstStageTest, FiveLevelsTakeLargerAddresses) {
  const VtdFirstStage five = First({.levels = 5});
  Put(0x40'8000 + 0x12 * 8, kFirstRoot | 0x27);
  ExpectLeaf(five.walk(0x40'8000, uint64_t{0x12} << 48 | kGva, Access::kRead),
             {0x567'8abc, 4096, kReadWrite});
  ExpectFault(five.walk(0x40'8000, uint64_t{1} << 56, Access::kRead), FaultCode::kInputRange, 0);
}

TEST_F(VtdFirstStageTest, LargePages) {
  Put(0x40'2d10, 0x1234'0000'00e7 | 0x1000);  // 2 MiB; bit 12 is PAT
  ExpectLeaf(First().walk(kFirstRoot, kGva, Access::kRead),
             {0x1234'0000'0000 + 0x16'7abc, kTwoMiB, kAllRights});
  Put(0x40'1240, 0x1234'4000'00e7);
  ExpectLeaf(First().walk(kFirstRoot, kGva, Access::kRead),
             {0x1234'4000'0000 + (kGva & (kOneGiB - 1)), kOneGiB, kAllRights});
}

TEST_F(VtdFirstStageTest, ReservedBitsAreFaults) {
  struct Case {
    uint64_t at, entry;
    uint8_t level;
  };
  for (const Case& c : {Case{0x40'2d10, 0x1234'0000'20e7, 1},       // 2 MiB page, bit 13
                        Case{0x40'1240, 0x1234'2000'00e7, 2},       // 1 GiB page, bit 29
                        Case{0x40'07f0, 0x40'10a7, 3},              // PS in a PML4E
                        Case{0x40'3b38, 0x8'0000'0567'8067, 0}}) {  // beyond 46 bits
    const uint64_t entry = Get(c.at);
    Put(c.at, c.entry);
    const auto result = First({.host_address_width = 46}).walk(kFirstRoot, kGva, Access::kRead);
    ExpectFault(result, FaultCode::kReserved, c.level);
    EXPECT_EQ(Reason(result, VtdMode::kFirstStage), 0x72);
    Put(c.at, entry);
  }
}

TEST_F(VtdFirstStageTest, NotPresentSaysAtWhichLevel) {
  for (const auto& [at, level] :
       std::map<uint64_t, uint8_t>{{0x40'07f0, 3}, {0x40'1240, 2}, {0x40'2d10, 1}, {kLeafAt, 0}}) {
    const uint64_t entry = Get(at);
    Put(at, entry & ~uint64_t{1});
    const auto result = First().walk(kFirstRoot, kGva, Access::kRead);
    ExpectFault(result, FaultCode::kNotPresent, level);
    EXPECT_EQ(result.error().span, uint64_t{1} << vtd::Shift(level));
    EXPECT_EQ(Reason(result, VtdMode::kFirstStage), 0x71);
    Put(at, entry);
  }
}

TEST_F(VtdFirstStageTest, TheInterruptRangeIsNoMemory) {
  Put(kLeafAt, 0xfee0'0067);
  const auto result = First().walk(kFirstRoot, kGva, Access::kWrite);
  ExpectFault(result, FaultCode::kInterruptRange, 0);
  EXPECT_EQ(Reason(result, VtdMode::kFirstStage, true), 0x87);
  EXPECT_TRUE(First({.is_nested = true}).walk(kFirstRoot, kGva, Access::kWrite));
  std::array<PageWord, 512> words;
  Put(0x40'2d10, 0xfee0'00e7);  // 2 MiB, of which the first is interrupts
  const Stretch stretch = First().walk_pages(kFirstRoot, kGva & ~(kTwoMiB - 1), words);
  EXPECT_EQ(stretch.pages, 0);
  EXPECT_EQ(stretch.fault->code, FaultCode::kInterruptRange);
  const Stretch behind = First().walk_pages(kFirstRoot, (kGva & ~(kTwoMiB - 1)) + 0x10'0000, words);
  EXPECT_EQ(behind.pages, 256);
  EXPECT_FALSE(behind.fault);
}

TEST_F(VtdFirstStageTest, TablesThatCannotBeReadOrMarkedAreFaults) {
  const auto no_root = First().walk(uint64_t{1} << 40, kGva, Access::kRead);
  ExpectFault(no_root, FaultCode::kTableAccess, 3);
  EXPECT_EQ(Reason(no_root, VtdMode::kFirstStage), 0x73);
  Put(0x40'1240, 0xff00'0000'0027);
  const auto no_table = First().walk(kFirstRoot, kGva, Access::kRead);
  ExpectFault(no_table, FaultCode::kTableAccess, 1);
  EXPECT_EQ(Reason(no_table, VtdMode::kFirstStage), 0x70);
  Put(0x40'1240, 0x7000'2007);  // the same tables, where they cannot be written
  Window(0x7000'0000, 0, Access::kRead);
  Put(0x40'2d10, 0x7000'3007);
  const auto read_only = First().walk(kFirstRoot, kGva, Access::kRead);
  ExpectFault(read_only, FaultCode::kUpdateFailed, 1);
  EXPECT_EQ(Reason(read_only, VtdMode::kFirstStage), 0x91);
}

TEST_F(VtdFirstStageTest, AnEntryThatChangesWhileItIsMarkedIsDecodedAnew) {
  Put(kLeafAt, 0x567'8007);
  int changes = 0;
  const ChangingTables changing(tables_.get(), [&](uint64_t at) {
    if (changes++ == 0) Put(at, 0x9ab'c005);  // elsewhere, and read-only
  });
  const VtdFirstStage walker({}, &changing);
  ExpectLeaf(walker.walk(kFirstRoot, kGva, Access::kRead),
             {0x9ab'cabc, 4096, kMayRead | kMayExecute});
  EXPECT_EQ(Get(kLeafAt), 0x9ab'c025);
  Put(kLeafAt, 0x567'8007);
  changes = 0;
  ExpectFault(walker.walk(kFirstRoot, kGva, Access::kWrite), FaultCode::kNoWrite, 0);
}

TEST_F(VtdFirstStageTest, AnEntryThatChangesAllTheTimeIsAFault) {
  Put(kLeafAt, 0x567'8007);
  uint64_t frame = 0;
  const ChangingTables changing(tables_.get(),
                                [&](uint64_t at) { Put(at, (frame += kPageSize) | 7); });
  const VtdFirstStage walker({}, &changing);
  ExpectFault(walker.walk(kFirstRoot, kGva, Access::kRead), FaultCode::kUpdateFailed, 0);
  EXPECT_LT(frame, 100 * kPageSize);
}

TEST_F(VtdFirstStageTest, AWalkSaysWhatNeedsNoOtherOne) {
  const auto marked = [&](Wanted wanted) {
    const auto result = First().walk(kFirstRoot, kGva, wanted);
    return result ? result->marked : Rights{0};
  };
  Put(kLeafAt, 0x567'8007);
  EXPECT_EQ(marked(Wanted()), 0) << "nothing was marked";
  EXPECT_EQ(marked(Access::kRead), kMayRead | kMayExecute);
  EXPECT_EQ(marked(Access::kWrite), kAllRights);
  EXPECT_EQ(marked(Access::kRead), kAllRights) << "dirty since then";
  EXPECT_EQ(marked(Wanted()), 0);
  Put(kLeafAt, 0x567'8065);
  EXPECT_EQ(marked(Access::kRead), kMayRead | kMayExecute) << "dirty, and may not be written";
}

TEST_F(VtdFirstStageTest, PagesThatAreKeptAreMarkedForAllThatTheyAllow) {
  Put(kLeafAt, 0x567'8007);
  Put(kLeafAt + 8, 0x567'9005);   // read-only
  Put(kLeafAt + 16, 0x567'a003);  // supervisors'
  std::array<PageWord, 3> words;
  const Stretch stretch = First().walk_pages(kFirstRoot, kGva & ~kPageMask, words);
  EXPECT_EQ(stretch.pages, 3);
  EXPECT_EQ(words, (std::array<PageWord, 3>{0x567'8003, 0x567'9001, 0}));
  EXPECT_EQ(Get(kLeafAt) & 0x60, 0x60);
  EXPECT_EQ(Get(kLeafAt + 8) & 0x60, 0x20);
  EXPECT_EQ(Get(kLeafAt + 16) & 0x60, 0);
}

TEST_F(VtdSecondStageTest, VectorWalks) {
  ExpectLeaf(Second().walk(kSecondRoot, 0x567'8abc, Access::kReadWrite),
             {0x10'0567'8abc, 4096, kReadWrite});
  ExpectLeaf(Second().walk(kSecondRoot, 0x40'07f0, Access::kReadWrite),
             {0x10'0040'07f0, kTwoMiB, kReadWrite});
}

TEST_F(VtdSecondStageTest, RightsAreThoseOfAllLevels) {
  Put(0x30'2000 + 0x2b * 8, 0x30'3001);
  const auto write = Second().walk(kSecondRoot, 0x567'8abc, Access::kWrite);
  ExpectFault(write, FaultCode::kNoWrite, 0);
  EXPECT_EQ(Reason(write, VtdMode::kSecondStage, true), 0x85);
  EXPECT_EQ(Reason(write, VtdMode::kLegacy, true), 0x5);
  Put(0x30'2000 + 0x2b * 8, 0x30'3002);
  const auto read = Second().walk(kSecondRoot, 0x567'8abc, Access::kRead);
  ExpectFault(read, FaultCode::kNoRead, 0);
  EXPECT_EQ(Reason(read, VtdMode::kSecondStage), 0x86);
  EXPECT_EQ(Reason(read, VtdMode::kLegacy), 0x6);
}

TEST_F(VtdSecondStageTest, AnEntryWithoutRightsIsAHole) {
  Put(0x30'2000 + 0x2b * 8, 0x30'3000);
  const auto result = Second().walk(kSecondRoot, 0x567'8abc, Access::kRead);
  ExpectFault(result, FaultCode::kNotPresent, 1);
  EXPECT_EQ(Reason(result, VtdMode::kSecondStage), 0x79);
  EXPECT_EQ(Reason(result, VtdMode::kLegacy), 0x6);
  EXPECT_EQ(Reason(result, VtdMode::kLegacy, /*is_write=*/true), 0x5);
}

TEST_F(VtdSecondStageTest, EachNumberOfLevelsHasItsWidth) {
  for (const uint8_t levels : {uint8_t{3}, uint8_t{4}, uint8_t{5}}) {
    const uint64_t end = uint64_t{1} << vtd::Shift(levels);
    const auto outside = Second({.levels = levels}).walk(kSecondRoot, end, Access::kRead);
    ExpectFault(outside, FaultCode::kInputRange, 0);
    EXPECT_EQ(Reason(outside, VtdMode::kLegacy), 0x4);
    ExpectFault(Second({.levels = levels}).walk(kSecondRoot, end - 1, Access::kRead),
                FaultCode::kNotPresent, static_cast<uint8_t>(levels - 1));
  }
  ExpectLeaf(Second({.levels = 3}).walk(0x30'1000, 0x567'8abc, Access::kRead),
             {0x10'0567'8abc, 4096, kReadWrite});
}

TEST_F(VtdSecondStageTest, ReservedBitsAreFaults) {
  struct Case {
    uint64_t at, entry;
    uint8_t level;
  };
  for (const Case& c :
       {Case{0x30'2000 + 0x2b * 8, 0x10'0560'1083, 1}, Case{0x30'1000, 0x10'0020'0083, 2},
        Case{0x30'0000, 0x30'1083, 3}, Case{0x30'3000 + 0x78 * 8, 0x4'0000'0567'8003, 0}}) {
    const uint64_t entry = Get(c.at);
    Put(c.at, c.entry);
    const auto result =
        Second({.host_address_width = 46}).walk(kSecondRoot, 0x567'8abc, Access::kRead);
    ExpectFault(result, FaultCode::kReserved, c.level);
    EXPECT_EQ(Reason(result, VtdMode::kSecondStage), 0x7a);
    EXPECT_EQ(Reason(result, VtdMode::kLegacy), 0xc);
    Put(c.at, entry);
  }
}

TEST_F(VtdSecondStageTest, FlagsAreKeptOnlyWhereTheEntryOfThePasidSaysSo) {
  const uint64_t leaf = 0x30'3000 + 0x78 * 8;
  EXPECT_TRUE(Second().walk(kSecondRoot, 0x567'8abc, Access::kWrite));
  EXPECT_EQ(Get(leaf), 0x10'0567'8003);
  EXPECT_TRUE(Second({.keeps_accessed = true}).walk(kSecondRoot, 0x567'8abc, Access::kRead));
  EXPECT_EQ(Get(leaf), 0x10'0567'8103);
  EXPECT_EQ(Get(0x30'1000), 0x30'2103);
  EXPECT_TRUE(Second({.keeps_accessed = true}).walk(kSecondRoot, 0x567'8abc, Access::kWrite));
  EXPECT_EQ(Get(leaf), 0x10'0567'8303);
}

TEST_F(VtdSecondStageTest, WithoutFlagsNothingIsLeftToBeMarked) {
  const uint64_t leaf = 0x30'3000 + 0x78 * 8;
  const auto marked = [&](bool keeps_accessed) {
    return Second({.keeps_accessed = keeps_accessed})
        .walk(kSecondRoot, 0x567'8abc, Access::kRead)
        ->marked;
  };
  EXPECT_EQ(marked(false), kReadWrite);
  EXPECT_EQ(marked(true), kMayRead);
  Put(leaf, Get(leaf) | 0x200);
  EXPECT_EQ(marked(true), kReadWrite);
}

TEST_F(VtdNestedTest, VectorWalkThroughBothStages) {
  const VtdSecondStage second = Second();
  const StageTwoTables through(&second, kSecondRoot, tables_.get());
  const VtdFirstStage first({.options = {.is_nested = true}}, &through);
  const TwoStageWalker nested(&first, &second, kSecondRoot);
  ExpectLeaf(nested.walk(kFirstRoot, kGva, Access::kReadWrite), {0x10'0567'8abc, 4096, kReadWrite});
}

TEST_F(VtdNestedTest, BothStagesHaveToBeMarked) {
  for (const bool first_is_dirty : {false, true}) {
    for (const bool second_is_dirty : {false, true}) {
      Put(kLeafAt, first_is_dirty ? 0x8000'0000'0567'8067 : 0x8000'0000'0567'8027);
      Put(0x30'3000 + 0x78 * 8, second_is_dirty ? 0x10'0567'8303 : 0x10'0567'8103);
      const VtdSecondStage second = Second({.keeps_accessed = true});
      const StageTwoTables through(&second, kSecondRoot, tables_.get());
      const VtdFirstStage first({.options = {.is_nested = true}}, &through);
      const TwoStageWalker nested(&first, &second, kSecondRoot);
      EXPECT_EQ(nested.walk(kFirstRoot, kGva, Access::kRead)->marked,
                first_is_dirty && second_is_dirty ? kReadWrite : kMayRead);
    }
  }
}

TEST_F(VtdNestedTest, AFlagThatTheSecondStageForbidsToWriteIsAFaultOfTheTable) {
  Put(0x30'2000 + 2 * 8, 0x10'0040'0081);
  Put(kLeafAt, 0x567'8007);
  const VtdSecondStage second = Second();
  const StageTwoTables through(&second, kSecondRoot, tables_.get());
  const VtdFirstStage first({.options = {.is_nested = true}}, &through);
  const TwoStageWalker nested(&first, &second, kSecondRoot);
  const auto result = nested.walk(kFirstRoot, kGva, Access::kRead);
  ExpectFault(result, FaultCode::kNoWrite, 1);
  EXPECT_EQ(result.error().stage, 2);
  EXPECT_TRUE(result.error().on_table);
  EXPECT_EQ(result.error().table_level, 0);
  EXPECT_EQ(result.error().address, kLeafAt);
  EXPECT_EQ(result.error().device_address, kGva);
  EXPECT_EQ(Reason(result, VtdMode::kNested), 0x77);
}

}  // namespace
}  // namespace mvgpu::domain
