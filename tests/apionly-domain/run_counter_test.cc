#include "apionly-domain/pin/run_counter.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <random>

namespace mvgpu::domain {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

TEST(RunCounter, CountsOverlappingRuns) {
  RunCounter counter;
  counter.add({10, 10});
  counter.add({15, 10});
  EXPECT_EQ(counter.count(9), 0u);
  EXPECT_EQ(counter.count(10), 1u);
  EXPECT_EQ(counter.count(15), 2u);
  EXPECT_EQ(counter.count(24), 1u);
  EXPECT_EQ(counter.unique_pages(), 15u);
  EXPECT_EQ(counter.total(), 20u);
  EXPECT_EQ(counter.runs(), 3u);
}

TEST(RunCounter, RemoveReturnsWhatIsHeldNoLonger) {
  RunCounter counter;
  counter.add({10, 10});
  counter.add({15, 10});
  EXPECT_THAT(counter.remove({10, 10}), ElementsAre(PageRun{10, 5}));
  EXPECT_THAT(counter.remove({15, 10}), ElementsAre(PageRun{15, 10}));
  EXPECT_TRUE(counter.empty());
  EXPECT_EQ(counter.total(), 0u);
}

TEST(RunCounter, SubRangesMayBeReleased) {
  RunCounter counter;
  counter.add({0, 100});
  EXPECT_THAT(counter.remove({40, 20}), ElementsAre(PageRun{40, 20}));
  EXPECT_THAT(counter.uncovered({30, 40}), ElementsAre(PageRun{40, 20}));
  EXPECT_TRUE(counter.any({39, 2}));
  EXPECT_FALSE(counter.any({40, 20}));
}

TEST(RunCounter, NeighboursWithTheSameCountAreOneRun) {
  RunCounter counter;
  for (uint64_t page = 0; page < 1000; ++page) counter.add({page, 1});
  EXPECT_EQ(counter.runs(), 1u);
  counter.add({500, 1});
  EXPECT_EQ(counter.runs(), 3u);
  EXPECT_THAT(counter.remove({500, 1}), IsEmpty());
  EXPECT_EQ(counter.runs(), 1u);
}

TEST(RunCounter, ClearForgetsHoweverOftenHeld) {
  RunCounter counter;
  counter.add({0, 10});
  counter.add({4, 2});
  counter.clear({3, 4});
  EXPECT_EQ(counter.unique_pages(), 6u);
  EXPECT_EQ(counter.total(), 6u);
  EXPECT_EQ(counter.count(4), 0u);
}

TEST(RunCounterDeathTest, ReleasingMoreThanHeldIsABug) {
  RunCounter counter;
  counter.add({0, 4});
  EXPECT_DEATH(counter.remove({2, 4}), "check failed");
}

TEST(RunCounter, AgreesWithAMapOfPages) {
  for (unsigned seed = 1; seed <= 20; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    RunCounter counter;
    std::map<uint64_t, uint64_t> naive;
    std::vector<PageRun> held;
    for (int step = 0; step < 2000; ++step) {
      if (held.empty() || random() % 2 == 0) {
        const PageRun run{random() % 64, 1 + random() % 16};
        counter.add(run);
        held.push_back(run);
        for (uint64_t p = run.first; p < run.end(); ++p) ++naive[p];
      } else {
        const size_t which = random() % held.size();
        const PageRun run = held[which];
        held.erase(held.begin() + static_cast<std::ptrdiff_t>(which));
        uint64_t freed = 0;
        for (uint64_t p = run.first; p < run.end(); ++p) {
          if (--naive[p] == 0) {
            naive.erase(p);
            ++freed;
          }
        }
        uint64_t freed_by_counter = 0;
        for (const PageRun& part : counter.remove(run)) freed_by_counter += part.count;
        ASSERT_EQ(freed_by_counter, freed);
      }
      ASSERT_EQ(counter.unique_pages(), naive.size());
      uint64_t total = 0;
      for (uint64_t p = 0; p < 80; ++p) {
        const auto it = naive.find(p);
        ASSERT_EQ(counter.count(p), it == naive.end() ? 0 : it->second);
        total += counter.count(p);
      }
      ASSERT_EQ(counter.total(), total);
    }
  }
}

}  // namespace
}  // namespace mvgpu::domain
