// Which pages go when there is no room, and when the device has no use for them.

#include "tests/apionly-domain/faults/faulting_fixture.h"

namespace mvgpu::domain {
namespace {

TEST_F(FaultingTest, NeverMorePagesThanTheLimitArePinned) {
  Fault({.around_pages = 4, .max_pinned_pages = 10});
  Map(0, 0, 0x40'0000);
  for (uint64_t page = 0; page < 100; page += 3) {
    ASSERT_NE(OutcomeAt(page), Outcome::kRetry);
    ASSERT_TRUE(Shown().contains(page));
    ExpectConsistent();
  }
  EXPECT_EQ(faulting_->counters().peak_pinned_pages, 10u);
  EXPECT_EQ(pins_->pages.size(), domain_->counters().pinned_pages);
}

TEST_F(FaultingTest, AWindowLargerThanTheLimitIsOnePage) {
  Fault({.around_pages = 16, .max_pinned_pages = 1});
  Map(0, 0, 0x40'0000);
  EXPECT_EQ(OutcomeAt(5), Outcome::kMapped);
  EXPECT_EQ(OutcomeAt(6), Outcome::kMapped);
  EXPECT_EQ(Shown(), Numbers(6, 1));
}

TEST_F(FaultingTest, TheClockSparesWhatWasUsedSinceItCameBy) {
  Fault({.max_pinned_pages = 4});
  Map(0, 0, 0x40'0000);
  for (uint64_t page = 0; page < 4; ++page) ASSERT_EQ(OutcomeAt(page), Outcome::kMapped);
  // All were used by their faults: one lap forgets that, the next takes the first.
  ASSERT_EQ(OutcomeAt(100), Outcome::kMapped);
  EXPECT_EQ(Shown(), (std::set<uint64_t>{1, 2, 3, 100}));
  // The device goes on with 1 and 2, as its tables say.
  target_->accessed = {1, 2};
  ASSERT_EQ(OutcomeAt(101), Outcome::kMapped);
  EXPECT_EQ(Shown(), (std::set<uint64_t>{1, 2, 100, 101}));
  // A fault of a page that is there is a use, too.
  ASSERT_EQ(OutcomeAt(1), Outcome::kThere);
  ASSERT_EQ(OutcomeAt(102), Outcome::kMapped);
  ASSERT_EQ(OutcomeAt(103), Outcome::kMapped);
  EXPECT_TRUE(Shown().contains(1));
  EXPECT_FALSE(Shown().contains(2));
}

TEST_F(FaultingTest, ADeviceThatUsesEverythingAllTheTimeStillGetsItsPage) {
  Fault({.max_pinned_pages = 4});
  Map(0, 0, 0x40'0000);
  target_->always_accessed = true;
  for (uint64_t page = 0; page < 600; page += 20) ASSERT_EQ(OutcomeAt(page), Outcome::kMapped);
  EXPECT_EQ(Shown().size(), 4u);
  ExpectConsistent();
}

TEST_F(FaultingTest, WhatTheDeviceDoesNotUseForAWholePeriodIsDropped) {
  Fault({.around_pages = 4});
  Map(0, 0, 0x40'0000);
  ASSERT_EQ(OutcomeAt(1), Outcome::kMapped);
  ASSERT_EQ(OutcomeAt(0x201), Outcome::kMapped);
  // All came since the last call: the device had no period yet in which to come to the neighbours.
  EXPECT_EQ(faulting_->drop_unused(), 0u);
  EXPECT_EQ(Shown().size(), 8u);
  // Used are one of a fault and a neighbour.
  target_->accessed = {0x201, 2};
  EXPECT_EQ(faulting_->drop_unused(), 6u);
  EXPECT_EQ(Shown(), (std::set<uint64_t>{2, 0x201}));
  target_->accessed = {0x201};
  EXPECT_EQ(faulting_->drop_unused(), 1u);
  EXPECT_EQ(Shown(), (std::set<uint64_t>{0x201}));
  EXPECT_EQ(faulting_->drop_unused(), 1u);
  EXPECT_EQ(faulting_->counters().evicted_pages, 8u);
  EXPECT_EQ(faulting_->drop_unused(), 0u);
  ExpectConsistent();
}

TEST_F(FaultingTest, AUseInTheFirstPeriodDoesNotCountForTheSecond) {
  Fault({.around_pages = 4});
  Map(0, 0, 0x40'0000);
  ASSERT_EQ(OutcomeAt(1), Outcome::kMapped);
  target_->accessed = {2};
  EXPECT_EQ(faulting_->drop_unused(), 0u);
  EXPECT_EQ(faulting_->drop_unused(), 4u);
  ExpectConsistent();
}

TEST_F(FaultingTest, APageThatComesBackHasAPeriodAnew) {
  Fault({.around_pages = 4});
  Map(0, 0, 0x40'0000);
  ASSERT_EQ(OutcomeAt(1), Outcome::kMapped);
  EXPECT_EQ(faulting_->drop_unused(), 0u);
  EXPECT_EQ(faulting_->invalidate(Pages(2, 1)), 1u);
  ASSERT_EQ(OutcomeAt(2), Outcome::kMapped);
  EXPECT_EQ(faulting_->drop_unused(), 3u);
  EXPECT_EQ(Shown(), (std::set<uint64_t>{2}));
  ExpectConsistent();
}

// Room is taken from neighbours that nobody used, however young they are; and what a page was used
// for before it went does not count when it comes back.
TEST_F(FaultingTest, WhatCameBackAsANeighbourCountsAsNotUsed) {
  Fault({.around_pages = 4, .max_pinned_pages = 4});
  Map(0, 0, BytesIn(4));
  for (const uint64_t lone : {0x10, 0x20, 0x30}) Map(BytesIn(lone), BytesIn(lone), BytesIn(1));
  ASSERT_EQ(At(1)->pages, 4u);
  ASSERT_EQ(OutcomeAt(3), Outcome::kThere);
  EXPECT_EQ(faulting_->invalidate(Pages(0, 4)), 4u);
  ASSERT_EQ(At(2)->pages, 4u);
  ASSERT_EQ(OutcomeAt(0x10), Outcome::kMapped);
  ASSERT_EQ(OutcomeAt(0x20), Outcome::kMapped);
  ASSERT_EQ(OutcomeAt(0x30), Outcome::kMapped);
  EXPECT_EQ(Shown(), (std::set<uint64_t>{2, 0x10, 0x20, 0x30}));
  ExpectConsistent();
}

}  // namespace
}  // namespace mvgpu::domain
