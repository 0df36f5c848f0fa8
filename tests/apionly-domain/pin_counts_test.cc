#include "apionly-domain/pin/pin_counts.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

namespace mvgpu::domain {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using Form = PinCounts::Form;

constexpr PageRun kLarge{0, 10000};

class PinCountsTest : public ::testing::Test {
 protected:
  std::vector<PageRun> Remove(PageRun run, Form form) {
    std::vector<PageRun> freed;
    counts_.remove(run, form, &freed);
    return freed;
  }
  std::vector<PageRun> Unheld(PageRun run) const {
    std::vector<PageRun> unheld;
    counts_.append_unheld(run, &unheld);
    return unheld;
  }

  PinCounts counts_;
};

TEST_F(PinCountsTest, SmallPinsAreCountedByPageAndLargeOnesAsRuns) {
  EXPECT_EQ(PinCounts::FormFor(1), Form::kDense);
  EXPECT_EQ(PinCounts::FormFor(512), Form::kDense);
  EXPECT_EQ(PinCounts::FormFor(513), Form::kRuns);
  counts_.add(kLarge, Form::kRuns);
  EXPECT_EQ(counts_.dense().held_pages(), 0u);
  EXPECT_TRUE(counts_.holds(9999));
}

TEST_F(PinCountsTest, APageIsHeldAsLongAsEitherFormCountsIt) {
  counts_.add(kLarge, Form::kRuns);
  counts_.add({5000, 3}, Form::kDense);
  EXPECT_THAT(Remove(kLarge, Form::kRuns), ElementsAre(PageRun{0, 5000}, PageRun{5003, 4997}));
  EXPECT_THAT(Unheld({4999, 5}), ElementsAre(PageRun{4999, 1}, PageRun{5003, 1}));
  EXPECT_THAT(Remove({5000, 3}, Form::kDense), ElementsAre(PageRun{5000, 3}));
  EXPECT_TRUE(counts_.empty());

  counts_.add(kLarge, Form::kRuns);
  counts_.add({5000, 3}, Form::kDense);
  EXPECT_THAT(Remove({5000, 3}, Form::kDense), IsEmpty());
  EXPECT_THAT(Remove(kLarge, Form::kRuns), ElementsAre(kLarge));
}

TEST_F(PinCountsTest, AHitInOneFormMayRestOnTheOther) {
  counts_.add(kLarge, Form::kRuns);
  EXPECT_TRUE(counts_.try_add({100, 4}, Form::kDense)) << "held, though not by page";
  EXPECT_TRUE(counts_.try_remove({100, 4}, Form::kDense));
  EXPECT_FALSE(counts_.try_remove(kLarge, Form::kRuns)) << "nothing else holds those";
  EXPECT_TRUE(counts_.holds(100)) << "a refusal changes nothing";
  EXPECT_TRUE(counts_.try_add(kLarge, Form::kRuns));
  EXPECT_TRUE(counts_.try_remove(kLarge, Form::kRuns));
}

TEST_F(PinCountsTest, ARunThatIsHalfHeldIsNoHit) {
  counts_.add({0, 4}, Form::kDense);
  EXPECT_FALSE(counts_.try_add({2, 4}, Form::kDense));
  EXPECT_FALSE(counts_.try_add({0, 600}, Form::kRuns));
  EXPECT_THAT(Unheld({0, 600}), ElementsAre(PageRun{4, 596}));
}

TEST_F(PinCountsTest, HitsGoOnAboveAByte) {
  counts_.add({0, 2}, Form::kDense);
  for (int i = 0; i < 1000; ++i) ASSERT_TRUE(counts_.try_add({0, 2}, Form::kDense)) << i;
  EXPECT_EQ(counts_.dense().count(1), 1001u);
  for (int i = 0; i < 1000; ++i) ASSERT_TRUE(counts_.try_remove({0, 2}, Form::kDense)) << i;
  EXPECT_FALSE(counts_.try_remove({0, 2}, Form::kDense));
}

TEST_F(PinCountsTest, HeldStretchesOfBothFormsAreFoundInsideTheAskedRunOnly) {
  counts_.add(kLarge, Form::kRuns);
  counts_.add({20000, 2}, Form::kDense);
  std::vector<PageRun> held;
  counts_.append_held({9990, 10011}, &held);
  EXPECT_THAT(held, ElementsAre(PageRun{9990, 10}, PageRun{20000, 1}));
  EXPECT_TRUE(counts_.any({20001, 5}));
  EXPECT_FALSE(counts_.any({10000, 10000}));
}

TEST_F(PinCountsTest, ForgettingSaysHowOftenEachPageWasHeld) {
  counts_.add({10, 4}, Form::kDense);
  for (int i = 0; i < 299; ++i) counts_.add({12, 1}, Form::kDense);
  counts_.add(kLarge, Form::kRuns);
  std::vector<std::pair<PageRun, uint64_t>> forgotten;
  counts_.forget({11, 5}, [&](PageRun run, uint64_t count) { forgotten.emplace_back(run, count); });
  EXPECT_EQ(forgotten, (std::vector<std::pair<PageRun, uint64_t>>{
                           {{11, 1}, 1}, {{12, 1}, 300}, {{13, 1}, 1}, {{11, 5}, 1}}));
  EXPECT_THAT(Unheld({0, 20}), ElementsAre(PageRun{11, 5}));
  EXPECT_EQ(counts_.dense().held_pages(), 1u);
  counts_.add({12, 1}, Form::kDense);  // counts from the beginning
  EXPECT_THAT(Remove({12, 1}, Form::kDense), ElementsAre(PageRun{12, 1}));
}

}  // namespace
}  // namespace mvgpu::domain
