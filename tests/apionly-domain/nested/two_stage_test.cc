#include "apionly-domain/nested/two_stage.h"

#include <array>

#include "apionly-domain/nested/vmsa_stage1.h"
#include "apionly-domain/nested/vmsa_stage2.h"
#include "tests/apionly-domain/nested/tables_fixture.h"

namespace mvgpu::domain {
namespace {

// An SMMU with both stages: the guest's tables at intermediate address 0xa0000000, which stage 2
// shows at 0x8'a0000000.
class TwoStageTest : public TablesTest {
 protected:
  static constexpr uint64_t kVa = 0x20'1234'5678;
  static constexpr uint64_t kRoot1 = 0xa000'0000;
  static constexpr uint64_t kRoot2 = 0x9000'0000;
  static constexpr uint64_t kTables = 0x8'a000'0000;
  static constexpr uint64_t kLeafAt = kTables + 0x2a28;
  static constexpr uint64_t kPage2At = 0x9000'2000 + 0x78 * 8;
  static constexpr uint64_t kTablesBlockAt = 0x9000'3000 + 0x100 * 8;

  void SetUp() override {
    TablesTest::SetUp();
    Window(kTables, 0);
    Window(kRoot2, 1);
    Put(kTables + 0x400, 0xa000'1003);
    Put(kTables + 0x1488, 0xa000'2003);
    Put(kLeafAt, 0x0060'0000'4567'8f43);
    Put(0x9000'0000 + 1 * 8, 0x9000'1003);
    Put(0x9000'1000 + 0x2b * 8, 0x9000'2003);
    Put(kPage2At, 0x8'4567'87ff);
    Put(0x9000'0000 + 2 * 8, 0x9000'3003);
    Put(kTablesBlockAt, 0x8'a000'07fd);  // 2 MiB
    second_ = std::make_unique<VmsaStage2>(
        VmsaStage2Format{{.t0sz = 25, .sl0 = 1, .output_bits = 40}}, tables_.get());
    through_ = std::make_unique<StageTwoTables>(second_.get(), kRoot2, tables_.get());
    Use({.t0sz = 25});
  }
  void Use(VmsaStage1Format::Options options) {
    first_ = std::make_unique<VmsaStage1>(VmsaStage1Format{options}, through_.get());
    walker_ = std::make_unique<TwoStageWalker>(first_.get(), second_.get(), kRoot2);
  }
  WalkResult Walk(Wanted wanted = Access::kRead) { return walker_->walk(kRoot1, kVa, wanted); }

  std::unique_ptr<VmsaStage2> second_;
  std::unique_ptr<StageTwoTables> through_;
  std::unique_ptr<VmsaStage1> first_;
  std::unique_ptr<TwoStageWalker> walker_;
};

TEST_F(TwoStageTest, VectorWalkThroughBothStages) {
  ExpectLeaf(Walk(Access::kReadWrite), {0x8'4567'8678, 4096, kReadWrite});
}

TEST_F(TwoStageTest, AFaultOfStage1SaysSo) {
  Put(kTables + 0x1488, 0);
  const auto result = Walk();
  ExpectFault(result, FaultCode::kNotPresent, 1);
  EXPECT_EQ(result.error().stage, 1);
  EXPECT_EQ(result.error().address, kVa);
  EXPECT_EQ(result.error().device_address, kVa);
}

TEST_F(TwoStageTest, AFaultOfStage2ForTheResultKeepsBothAddresses) {
  Put(kPage2At, 0);
  const auto result = Walk();
  ExpectFault(result, FaultCode::kNotPresent, 0);
  EXPECT_EQ(result.error().stage, 2);
  EXPECT_FALSE(result.error().on_table);
  EXPECT_EQ(result.error().address, 0x4567'8678);
  EXPECT_EQ(result.error().device_address, kVa);
  EXPECT_EQ(SmmuEventClass(result.error()), 2);
}

TEST_F(TwoStageTest, AFaultOfStage2ForATableSaysWhichOne) {
  Put(kTables + 0x1488, 0xa020'2003);  // the last table where stage 2 has nothing
  const auto result = Walk();
  ExpectFault(result, FaultCode::kNotPresent, 1);
  EXPECT_EQ(result.error().stage, 2);
  EXPECT_TRUE(result.error().on_table);
  EXPECT_EQ(result.error().table_level, 0);
  EXPECT_EQ(result.error().address, 0xa020'2a28);
  EXPECT_EQ(result.error().device_address, kVa);
  EXPECT_EQ(SmmuEventClass(result.error()), 1);
  EXPECT_EQ(SmmuEventType(result.error()), 0x10);
}

TEST_F(TwoStageTest, ATableThatStage2LeadsOutOfMemoryIsAFaultOfStage1) {
  Put(kTablesBlockAt, 0x8'c000'07fd);
  const auto result = Walk();
  ExpectFault(result, FaultCode::kTableAccess, 2);
  EXPECT_EQ(result.error().stage, 1);
}

TEST_F(TwoStageTest, RightsAreThoseOfBothStages) {
  Put(kPage2At, 0x8'4567'877f);  // read-only in stage 2
  EXPECT_TRUE(Walk(Access::kRead));
  const auto write = Walk(Access::kWrite);
  ExpectFault(write, FaultCode::kNoWrite, 0);
  EXPECT_EQ(write.error().stage, 2);
  Put(kPage2At, 0x8'4567'87ff);
  Put(kLeafAt, 0x4567'8fc3);  // and in stage 1
  EXPECT_EQ(Walk(Access::kWrite).error().stage, 1);
}

TEST_F(TwoStageTest, TheSpanIsTheSmallerOne) {
  Put(kTables + 0x1488, 0x4560'0741);  // 2 MiB in stage 1, a page in stage 2
  ExpectFault(Walk(), FaultCode::kNotPresent, 0);
  Put(0x9000'2000 + 0x145 * 8, 0x8'1111'17ff);
  ExpectLeaf(Walk(), {0x8'1111'1678, 4096, kAllRights});
}

TEST_F(TwoStageTest, FlagsOfStage1AreWrittenThroughStage2) {
  Use({.t0sz = 25, .flags = {.sets_access_flag = true}});
  Put(kLeafAt, 0x4567'8f43 & ~uint64_t{1 << 10});
  Put(kTablesBlockAt, 0x8'a000'077d);  // read-only
  const auto result = Walk();
  ExpectFault(result, FaultCode::kNoWrite, 1);
  EXPECT_TRUE(result.error().on_table);
  Put(kTablesBlockAt, 0x8'a000'07fd);
  EXPECT_TRUE(Walk());
  EXPECT_EQ(Get(kLeafAt), 0x4567'8f43);
}

TEST_F(TwoStageTest, PagesGoThroughStage2OneByOne) {
  Put(kLeafAt + 8, 0x4567'9f43);   // nothing in stage 2
  Put(kLeafAt + 16, 0x4567'af43);  // read-only there
  Put(kPage2At + 16, 0x8'0000'077f);
  Put(kLeafAt + 24, 0x4567'bfc3);  // read-only here
  Put(kPage2At + 24, 0x8'0000'17ff);
  Put(kLeafAt + 32, 0x4567'cf43);  // too far away in stage 2
  Put(kPage2At + 32, uint64_t{1} << 45 | 0x7ff);
  std::array<PageWord, 16> words;
  const Stretch stretch = walker_->walk_pages(kRoot1, kVa & ~kPageMask, words);
  EXPECT_EQ(stretch.pages, 4);
  EXPECT_EQ(words[0], 0x8'4567'8003);
  EXPECT_EQ(words[1], 0);
  EXPECT_EQ(words[2], 0x8'0000'0001);
  EXPECT_EQ(words[3], 0x8'0000'1001);
  ASSERT_TRUE(stretch.fault);
  EXPECT_EQ(stretch.fault->code, FaultCode::kOutputRange);
  EXPECT_EQ(stretch.fault->stage, 2);
  EXPECT_EQ(stretch.fault->device_address, (kVa & ~kPageMask) + 4 * kPageSize);
  EXPECT_EQ(stretch.fault_pages, 1);
}

TEST_F(TwoStageTest, ANestedDomainFollowsBothStages) {
  const uint64_t va = kVa & ~kPageMask;
  Put(kPage2At, kFrames | 0x7ff);
  NestedDomain& nested = Nest(walker_.get(), kRoot1, RangeAt(0x20'0000'0000, uint64_t{1} << 30),
                              NestedDomain::OnFault::kSkip);
  EXPECT_EQ(nested.refresh_all().end, Refreshed::End::kDone);
  EXPECT_EQ(nested.translate(Iova(kVa), Access::kReadWrite), GuestPhys(kFrames + 0x678));
  Put(kPage2At, (kFrames + 0x3000) | 0x77f);  // the hypervisor moves it, and takes writing away
  nested.refresh(RangeAt(va, kPageSize));
  EXPECT_EQ(nested.translate(Iova(kVa), Access::kRead), GuestPhys(kFrames + 0x3678));
  EXPECT_FALSE(nested.translate(Iova(kVa), Access::kWrite));
  Put(0x9000'0000 + 2 * 8, 0);  // stage 2 shows no tables any more
  nested.refresh_all();
  EXPECT_EQ(PinnedPages(), 0);
}

}  // namespace
}  // namespace mvgpu::domain
