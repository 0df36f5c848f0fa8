#include "apionly-domain/pin/page_counters.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <random>
#include <vector>

namespace mvgpu::domain {

class PageCountersPeer {
 public:
  static bool HasArray(const PageCounters& counters, uint64_t page) {
    const auto* chunk = counters.FindChunk(page >> PageCounters::kChunkShift);
    return chunk != nullptr && chunk->words != nullptr;
  }
};

namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

constexpr uint64_t kLastPage = UINT64_MAX >> kPageShift;  // of the address space
constexpr uint64_t kFarPage = uint64_t{1} << 40;          // beyond 16 TiB

class PageCountersTest : public ::testing::Test {
 protected:
  std::vector<PageRun> Remove(PageRun run) {
    std::vector<PageRun> freed;
    counters_.remove(run, &freed);
    return freed;
  }
  std::vector<PageRun> Held(PageRun run) const {
    std::vector<PageRun> held;
    counters_.for_each_held(run, [&held](PageRun part) { held.push_back(part); });
    return held;
  }

  PageCounters counters_;
};

TEST_F(PageCountersTest, CountsPagesAndSaysWhichAreHeldNoLonger) {
  counters_.add({10, 10});
  counters_.add({15, 10});
  EXPECT_EQ(counters_.count(9), 0u);
  EXPECT_EQ(counters_.count(14), 1u);
  EXPECT_EQ(counters_.count(15), 2u);
  EXPECT_EQ(counters_.held_pages(), 15u);
  EXPECT_THAT(Remove({10, 10}), ElementsAre(PageRun{10, 5}));
  EXPECT_THAT(Remove({15, 10}), ElementsAre(PageRun{15, 10}));
  EXPECT_EQ(counters_.held_pages(), 0u);
}

TEST_F(PageCountersTest, TryAddOnlyCountsPagesThatAreAllHeldAlready) {
  counters_.add({0, 8});
  EXPECT_TRUE(counters_.try_add({2, 4}));
  EXPECT_FALSE(counters_.try_add({6, 4}));
  EXPECT_EQ(counters_.count(7), 1u) << "a refusal changes nothing";
  EXPECT_EQ(counters_.count(2), 2u);
}

TEST_F(PageCountersTest, TryRemoveLeavesEveryPageHeld) {
  counters_.add({0, 8});
  counters_.add({2, 4});
  EXPECT_TRUE(counters_.try_remove({2, 4}));
  EXPECT_FALSE(counters_.try_remove({2, 4}));
  EXPECT_FALSE(counters_.try_remove({100, 1}));
  EXPECT_EQ(counters_.count(2), 1u);
}

// Every count around the end of a byte, up and down again.
TEST_F(PageCountersTest, CountsAboveAByteNeverOverflow) {
  constexpr uint64_t kMany = 70000;
  for (uint64_t i = 1; i <= kMany; ++i) {
    if (!counters_.try_add({5, 1})) counters_.add({5, 1});
    if (i < 260 || i == kMany) {
      ASSERT_EQ(counters_.count(5), i);
    }
  }
  EXPECT_EQ(counters_.held_pages(), 1u);
  EXPECT_TRUE(counters_.holds(5));
  EXPECT_EQ(counters_.count(4), 0u);
  EXPECT_EQ(counters_.count(6), 0u);
  for (uint64_t i = kMany; i-- > 0;) {
    if (!counters_.try_remove({5, 1})) {
      const auto freed = Remove({5, 1});
      ASSERT_EQ(freed.empty(), i != 0) << i;
    }
    if (i < 260) {
      ASSERT_EQ(counters_.count(5), i);
    }
  }
  EXPECT_FALSE(counters_.holds(5));
}

TEST_F(PageCountersTest, OnePageMoreOrLessAsLongAsItStaysHeld) {
  EXPECT_FALSE(counters_.try_add_one(5));
  EXPECT_FALSE(counters_.try_remove_one(5));
  EXPECT_FALSE(counters_.try_add_one(kFarPage));
  EXPECT_FALSE(counters_.try_remove_one(kFarPage));
  for (const uint64_t page : {uint64_t{5}, kFarPage}) {
    counters_.add({page, 1});
    EXPECT_FALSE(counters_.try_remove_one(page));
    for (uint64_t count = 2; count < 300; ++count) {
      ASSERT_TRUE(counters_.try_add_one(page));
      ASSERT_EQ(counters_.count(page), count);
    }
    for (uint64_t count = 299; --count > 0;) {
      ASSERT_TRUE(counters_.try_remove_one(page));
      ASSERT_EQ(counters_.count(page), count);
    }
    EXPECT_FALSE(counters_.try_remove_one(page));
    EXPECT_EQ(counters_.count(page), 1u);
  }
  EXPECT_EQ(counters_.held_pages(), 2u);
}

// The byte says how much more than three: what one count leaves there must not be the next one's.
TEST_F(PageCountersTest, AForgottenPageIsCountedAnew) {
  for (const uint64_t holds : {3, 4, 257, 258, 400}) {
    for (uint64_t i = 0; i < holds; ++i) counters_.add({7, 1});
    counters_.add({8, 1});
    EXPECT_EQ(counters_.forget(7), holds);
    for (uint64_t count = 1; count < 6; ++count) {
      counters_.add({7, 1});
      EXPECT_EQ(counters_.count(7), count) << holds;
    }
    EXPECT_EQ(counters_.forget(7), 5u);
    for (int i = 0; i < 3; ++i) counters_.add({8, 1});
    EXPECT_EQ(counters_.count(8), 4u);
    EXPECT_EQ(counters_.forget(8), 4u);
  }
}

TEST_F(PageCountersTest, OneFullByteSendsTheWholeRunTheSlowWay) {
  counters_.add({0, 16});
  for (int i = 0; i < 300; ++i) counters_.add({7, 1});
  EXPECT_FALSE(counters_.try_add({0, 16}));
  EXPECT_FALSE(counters_.try_remove({0, 16}));
  counters_.add({0, 16});
  EXPECT_EQ(counters_.count(7), 302u);
  EXPECT_EQ(counters_.count(8), 2u);
  EXPECT_THAT(Remove({0, 16}), IsEmpty());
}

// 32 pages share a word: every start and length around that, with neighbours that must not change.
TEST_F(PageCountersTest, NeighboursInAWordAreNotTouched) {
  counters_.add({0, 160});
  for (uint64_t first = 30; first < 66; ++first) {
    for (uint64_t count = 1; count < 70; ++count) {
      ASSERT_TRUE(counters_.try_add({first, count}));
      for (uint64_t page = 28; page < 140; ++page) {
        ASSERT_EQ(counters_.count(page), page >= first && page < first + count ? 2u : 1u) << page;
      }
      ASSERT_FALSE(counters_.try_remove({first - 1, count + 1}));
      ASSERT_FALSE(counters_.try_remove({first, count + 1}));
      ASSERT_TRUE(counters_.try_remove({first, count}));
    }
  }
  EXPECT_THAT(Remove({0, 160}), ElementsAre(PageRun{0, 160}));
}

TEST_F(PageCountersTest, SaysWhichRunsAreHeldOnceAndTwice) {
  counters_.add({10, 90});
  counters_.add({20, 70});
  counters_.add({30, 5});
  EXPECT_TRUE(counters_.all_held({10, 90}));
  EXPECT_FALSE(counters_.all_held({9, 90}));
  EXPECT_FALSE(counters_.all_held({11, 90}));
  EXPECT_TRUE(counters_.all_held_twice({20, 70}));
  EXPECT_FALSE(counters_.all_held_twice({19, 70}));
  EXPECT_FALSE(counters_.all_held_twice({21, 70}));
  EXPECT_FALSE(counters_.all_held({kFarPage, 1}));
  Remove({30, 5});
  Remove({20, 70});
  Remove({10, 90});
}

TEST_F(PageCountersTest, RunsMayCrossArraysAndLieAnywhere) {
  const uint64_t edge = PageCounters::kChunkPages;
  for (const uint64_t first : {edge - 3, kFarPage + edge - 3, kLastPage - 5}) {
    SCOPED_TRACE(first);
    const PageRun run{first, 6};
    counters_.add(run);
    EXPECT_TRUE(counters_.try_add(run));
    EXPECT_TRUE(counters_.any({first + 5, 1}));
    EXPECT_FALSE(counters_.any({first - 10, 10}));
    EXPECT_THAT(Held(run), ElementsAre(run));
    EXPECT_TRUE(counters_.try_remove(run));
    EXPECT_THAT(Remove(run), ElementsAre(run));
    EXPECT_THAT(Held(run), IsEmpty());
  }
}

TEST_F(PageCountersTest, HeldStretchesComeInOrderAlsoFromFarAway) {
  counters_.add({kFarPage, 2});
  counters_.add({3, 2});
  counters_.add({kLastPage, 1});
  counters_.add({7, 1});
  const PageRun everything{0, kLastPage + 1};
  EXPECT_THAT(Held(everything), ElementsAre(PageRun{3, 2}, PageRun{7, 1}, PageRun{kFarPage, 2},
                                            PageRun{kLastPage, 1}));
  EXPECT_THAT(Held({4, kFarPage - 3}),
              ElementsAre(PageRun{4, 1}, PageRun{7, 1}, PageRun{kFarPage, 1}));
}

TEST_F(PageCountersTest, TrimGivesBackIdleArraysOnly) {
  const uint64_t chunk = PageCounters::kChunkPages;
  counters_.add({0, 1});
  counters_.add({chunk, 1});
  counters_.add({kFarPage, 1});
  Remove({0, 1});
  Remove({kFarPage, 1});
  counters_.trim({0, kLastPage + 1});
  EXPECT_FALSE(PageCountersPeer::HasArray(counters_, 0));
  EXPECT_FALSE(PageCountersPeer::HasArray(counters_, kFarPage));
  EXPECT_EQ(counters_.count(chunk), 1u);
  Remove({chunk, 1});
  counters_.trim({chunk + 1, chunk});  // not the whole array
  EXPECT_TRUE(PageCountersPeer::HasArray(counters_, chunk));
  EXPECT_FALSE(counters_.try_add({0, 1})) << "what was given back reads as not held";
  EXPECT_FALSE(counters_.holds(0));
  counters_.add({0, 1});
  EXPECT_EQ(counters_.count(0), 1u) << "an array that was given back can come again";
}

TEST_F(PageCountersTest, ARefusalOverTheEdgeOfAnArrayChangesNothing) {
  for (const uint64_t edge : {PageCounters::kChunkPages, PageCounters::kNearPages}) {
    SCOPED_TRACE(edge);
    counters_.add({edge - 3, 5});
    EXPECT_FALSE(counters_.try_add({edge - 3, 6}));
    EXPECT_EQ(counters_.count(edge - 3), 1u);
    EXPECT_TRUE(counters_.try_add({edge - 3, 5}));
    EXPECT_FALSE(counters_.try_remove({edge - 3, 6}));
    EXPECT_EQ(counters_.count(edge - 3), 2u);
  }
}

TEST_F(PageCountersTest, TrimGivesTheMemoryBack) {
  counters_.add({0, 1});
  void* const memory = PageCounters::Near(counters_).word_of(0);
  unsigned char is_there = 0;
  ASSERT_EQ(mincore(memory, kPageSize, &is_there), 0);
  EXPECT_EQ(is_there & 1, 1);
  Remove({0, 1});
  counters_.trim({0, PageCounters::kChunkPages});
  ASSERT_EQ(mincore(memory, kPageSize, &is_there), 0);
  EXPECT_EQ(is_there & 1, 0);
}

TEST_F(PageCountersTest, WhereNothingWasEverHeldNothingIsAHit) {
  const PageCounters::Near near(counters_);
  for (const uint64_t page :
       {uint64_t{0}, 5 * PageCounters::kChunkPages, PageCounters::kNearPages - 1}) {
    EXPECT_FALSE(near.try_add({page, 1}));
    EXPECT_FALSE(near.try_remove({page, 1}));
    EXPECT_FALSE(PageCounters::Near::TryAddOne(near.word_of(page), page));
    EXPECT_EQ(counters_.count(page), 0u);
  }
  EXPECT_FALSE(near.try_add({PageCounters::kChunkPages - 40, 80})) << "over the edge of an array";
  near.prefetch(kLastPage);  // no page of its own, and no harm
}

// Words whose pages are held 0, 1, 2 and more times, side by side, over the edge of an array.
TEST_F(PageCountersTest, RandomRunsAgreeWithANaiveCount) {
  constexpr uint64_t kFirst = PageCounters::kChunkPages - 100;
  constexpr uint64_t kPages = 200;
  std::vector<uint64_t> naive(kPages);
  std::vector<PageRun> added;
  std::mt19937_64 random(1);
  for (int step = 0; step < 4000; ++step) {
    if (added.empty() || (random() % 2 == 0 && added.size() < 12)) {
      const uint64_t at = random() % kPages;
      const PageRun run{kFirst + at, 1 + random() % (kPages - at)};
      counters_.add(run);
      for (uint64_t i = 0; i < run.count; ++i) ++naive[at + i];
      added.push_back(run);
    } else {
      std::swap(added[random() % added.size()], added.back());
      const PageRun run = added.back();
      added.pop_back();
      std::vector<bool> expected(kPages);
      for (uint64_t i = run.first - kFirst; i < run.end() - kFirst; ++i) {
        expected[i] = --naive[i] == 0;
      }
      std::vector<bool> freed(kPages);
      for (const PageRun& part : Remove(run)) {
        for (uint64_t page = part.first; page < part.end(); ++page) freed[page - kFirst] = true;
      }
      ASSERT_EQ(freed, expected) << "step " << step;
    }
    for (uint64_t i = 0; i < kPages; ++i) {
      ASSERT_EQ(counters_.count(kFirst + i), naive[i]) << "step " << step << " page " << i;
    }
    const auto held = kPages - static_cast<uint64_t>(std::count(naive.begin(), naive.end(), 0));
    ASSERT_EQ(counters_.held_pages(), held);
  }
}

TEST_F(PageCountersTest, ReleasingWhatIsNotHeldIsABug) {
  counters_.add({0, 4});
  std::vector<PageRun> freed;
  EXPECT_DEATH(counters_.remove({2, 4}, &freed), "check failed");
  EXPECT_DEATH(counters_.remove({kFarPage, 1}, &freed), "check failed");
}

TEST_F(PageCountersTest, WholeWordsAndSinglePagesMix) {
  counters_.add({20, 100});  // parts of words at both ends
  counters_.add({40, 1});
  counters_.add({64, 32});
  EXPECT_EQ(counters_.held_pages(), 100u);
  EXPECT_THAT(Remove({20, 100}), ElementsAre(PageRun{20, 20}, PageRun{41, 23}, PageRun{96, 24}));
  EXPECT_EQ(counters_.held_pages(), 33u);
  EXPECT_EQ(counters_.forget(40), 1u);
  EXPECT_EQ(counters_.forget(40), 0u);
  EXPECT_THAT(Remove({64, 32}), ElementsAre(PageRun{64, 32}));
  EXPECT_EQ(counters_.held_pages(), 0u);
}

}  // namespace
}  // namespace mvgpu::domain
