#include "apionly-domain/faults/page_bits.h"

#include <gtest/gtest.h>

#include <bitset>
#include <random>
#include <vector>

namespace mvgpu::domain {
namespace {

constexpr uint64_t kPages = PageBits::kPages;

std::vector<PageRun> RunsOf(const PageBits& bits, PageRun within) {
  std::vector<PageRun> runs;
  bits.for_each_run(within, [&](PageRun run) { runs.push_back(run); });
  return runs;
}

TEST(PageBitsTest, NothingIsSetAtFirst) {
  const PageBits bits;
  EXPECT_TRUE(bits.none());
  EXPECT_TRUE(RunsOf(bits, {0, kPages}).empty());
  EXPECT_EQ(bits.find(0, kPages, true), kPages);
  EXPECT_EQ(bits.find(70, 80, false), 70u);
}

TEST(PageBitsTest, RunsGoOverTheEndsOfWords) {
  for (const PageRun run : {PageRun{0, 1}, PageRun{63, 2}, PageRun{64, 64}, PageRun{1, 510},
                            PageRun{511, 1}, PageRun{0, kPages}}) {
    PageBits bits;
    bits.set(run);
    EXPECT_FALSE(bits.none());
    EXPECT_EQ(RunsOf(bits, {0, kPages}), std::vector<PageRun>{run});
    EXPECT_EQ(bits.find(0, kPages, true), run.first);
    EXPECT_EQ(bits.find(run.first, kPages, false), run.end());
    bits.assign(run, false);
    EXPECT_TRUE(bits.none());
  }
}

TEST(PageBitsTest, OnlyWhatIsAskedForIsVisited) {
  PageBits bits;
  bits.set({10, 100});
  bits.clear({50, 1});
  EXPECT_EQ(RunsOf(bits, {20, 60}), (std::vector<PageRun>{{20, 30}, {51, 29}}));
  EXPECT_TRUE(RunsOf(bits, {50, 1}).empty());
  EXPECT_TRUE(RunsOf(bits, {110, 402}).empty());
}

TEST(PageBitsTest, WhatIsVisitedMayBeCleared) {
  PageBits bits;
  bits.set({3, 5});
  bits.set({60, 10});
  uint64_t visited = 0;
  bits.for_each_run({0, kPages}, [&](PageRun run) {
    bits.clear(run);
    visited += run.count;
  });
  EXPECT_EQ(visited, 15u);
  EXPECT_TRUE(bits.none());
}

TEST(PageBitsTest, ItIsABitsetWhateverHappens) {
  std::mt19937_64 random(5);
  PageBits bits;
  std::bitset<kPages> expected;
  for (int step = 0; step < 2000; ++step) {
    const uint64_t first = random() % kPages;
    const uint64_t limit = random() % 8 == 0 ? kPages : 80;
    const PageRun run{first, 1 + random() % std::min(limit, kPages - first)};
    const bool value = random() % 2 == 0;
    bits.assign(run, value);
    for (uint64_t page = run.first; page < run.end(); ++page) expected[page] = value;
    const uint64_t from = random() % kPages;
    uint64_t found = from;
    while (found < kPages && expected[found] != value) ++found;
    ASSERT_EQ(bits.find(from, kPages, value), found);
    ASSERT_EQ(bits.none(), expected.none());
    ASSERT_EQ(bits.test(from), expected[from]);
    uint64_t visited = 0;
    bits.for_each_run({0, kPages}, [&](PageRun set) { visited += set.count; });
    ASSERT_EQ(visited, expected.count());
  }
}

}  // namespace
}  // namespace mvgpu::domain
