#include "apionly-domain/faults/balloon.h"

#include <fcntl.h>

#include <array>
#include <functional>
#include <vector>

#include "tests/apionly-domain/faults/faulting_fixture.h"

namespace mvgpu::domain {
namespace {

using ::testing::ElementsAre;
using testing::FailsWith;
using testing::IsOk;

// Gives pages back by holes in the RAM's file, as a VMM does; guest-physical addresses are offsets.
class BalloonTest : public FaultingTest, public Balloon::Owner {
 protected:
  void SetUp() override {
    FaultingTest::SetUp();
    Map(0, 0, 0x40'0000);
  }
  Result<void> give_back(IovaRange range) override {
    given_.push_back(PagesOf(range));
    if (meanwhile_) meanwhile_(range);
    if (fails_) return Fail(ErrorCode::kSystem, "no hole");
    EXPECT_EQ(
        fallocate(ram_.fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                  static_cast<off_t>(range.start().value()), static_cast<off_t>(range.size())),
        0);
    return {};
  }
  Result<Balloon::Given> Inflate(std::vector<uint32_t> frames) {
    return Balloon({faulting_.get(), nullptr, this}).inflate(frames);
  }

  std::vector<PageRun> given_;
  std::function<void(IovaRange)> meanwhile_;
  bool fails_ = false;
};

TEST_F(BalloonTest, PagesAreOutOfReachAndUnpinnedBeforeTheyGo) {
  for (const uint64_t page : {0x10, 0x11, 0x12, 0x13}) {
    ram_.put(BytesIn(page), uint64_t{0x5555});
    ASSERT_THAT(At(page), IsOk());
  }
  meanwhile_ = [&](IovaRange) {
    EXPECT_EQ(Shown(), (std::set<uint64_t>{0x10, 0x13}));
    EXPECT_EQ(domain_->counters().pinned_pages, 2u);
    EXPECT_EQ(OutcomeAt(0x11), Outcome::kRetry);  // and no fault brings one back
    EXPECT_EQ(OutcomeAt(0x13), Outcome::kThere);
  };
  const auto given = Inflate({0x12, 0x11});
  ASSERT_THAT(given, IsOk());
  EXPECT_EQ(given->pages, 2u);
  EXPECT_THAT(given_, ElementsAre(PageRun{0x11, 2}));
  EXPECT_EQ(ram_.get<uint64_t>(BytesIn(0x11)), 0u);
  EXPECT_EQ(ram_.get<uint64_t>(BytesIn(0x13)), 0x5555u);
  EXPECT_EQ(OutcomeAt(0x11), Outcome::kMapped);  // the guest has deflated
  ExpectConsistent();
}

TEST_F(BalloonTest, ARequestIsSortedAndEachPageGoesOnce) {
  const auto given = Inflate({9, 7, 8, 7, 0x20, 9});
  ASSERT_THAT(given, IsOk());
  EXPECT_EQ(given->pages, 4u);
  EXPECT_THAT(given_, ElementsAre(PageRun{7, 3}, PageRun{0x20, 1}));
  EXPECT_EQ(Inflate({})->pages, 0u);
}

TEST_F(BalloonTest, WhatTheOwnerCannotGiveIsReportedAndUsableAgain) {
  ASSERT_THAT(At(5), IsOk());
  fails_ = true;
  const auto given = Inflate({5, 6});
  ASSERT_THAT(given, IsOk());
  EXPECT_EQ(given->failed, 2u);
  EXPECT_EQ(given->pages, 0u);
  EXPECT_EQ(OutcomeAt(5), Outcome::kMapped);
}

TEST_F(BalloonTest, ARequestIsBounded) {
  EXPECT_THAT(Inflate(std::vector<uint32_t>(Balloon::kMaxFrames, 3)), IsOk());
  EXPECT_THAT(Inflate(std::vector<uint32_t>(Balloon::kMaxFrames + 1, 3)),
              FailsWith(ErrorCode::kInvalid));
  EXPECT_EQ(given_.size(), 1u);
  EXPECT_THAT(Inflate({UINT32_MAX, 0}), IsOk());  // where nothing is mapped: the owner's business
}

}  // namespace
}  // namespace mvgpu::domain
