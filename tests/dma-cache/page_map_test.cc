#include "dma-cache/page_map.h"

#include <gtest/gtest.h>

#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <map>
#include <random>
#include <string>

#include "apionly-domain/base/reserved_memory.h"
#include "dma-cache/near_targets.h"
#include "dma-cache/reverse_map.h"
#include "dma-cache/revoked_holds.h"

namespace mvgpu::dma {
namespace {

using Flags = PageMapFlags;

// What a loop over single pages sees, without kStart; 0: nothing.
uint64_t WordNear(const PageMap<FlatLeaves>& map, uint64_t page) {
  const NearTargets near(map);
  const uint64_t word = NearTargets::WordOf(near.look_up(page));
  return (word & (Flags::kRead | Flags::kWrite)) == 0 ? 0 : word & ~Flags::kStart;
}
// What it should see: pages from 16 TiB on are not near.
uint64_t NearWordOf(const PageMap<FlatLeaves>& map, uint64_t page) {
  return page >> 32 == 0 ? map.find(page).word & ~Flags::kStart : 0;
}

// Random stretches around the edges of every level, against a map of single pages.
TEST(PageMapTest, AgreesWithAMapOfPages) {
  constexpr uint64_t kPlaces[] = {
      0, 500, 1 << 18, (1 << 18) - 30, (uint64_t{1} << 32) - 600, uint64_t{1} << 40};
  PageMap<FlatLeaves> map;
  std::map<uint64_t, std::pair<uint64_t, uint64_t>> naive;  // page -> target, flags
  std::mt19937_64 random(5);
  for (int step = 0; step < 4000; ++step) {
    const uint64_t first = kPlaces[random() % std::size(kPlaces)] + random() % 600;
    PageRun run{first, 1 + random() % (random() % 8 == 0 ? 1600 : 20)};
    const auto taken = naive.lower_bound(run.first);
    switch (random() % 4) {
      case 0:
      case 1: {
        if (taken != naive.end() && taken->first < run.end()) run.count = taken->first - run.first;
        if (run.count == 0) break;
        const uint64_t target = random() % (uint64_t{1} << (random() % 4 == 0 ? 51 : 39));
        map.map(run, target, Flags::kRead | Flags::kPinnedRead);
        for (uint64_t i = 0; i < run.count; ++i) {
          naive[run.first + i] = {target + i,
                                  Flags::kRead | Flags::kPinnedRead | (i == 0 ? Flags::kStart : 0)};
        }
        break;
      }
      case 2:
        map.unmap(run);
        naive.erase(taken, naive.lower_bound(run.end()));
        break;
      default: {
        const uint64_t set = random() % 2 == 0 ? Flags::kGoing : Flags::kPinnedWrite;
        const uint64_t clear = random() % 2 == 0 ? Flags::kPinnedRead : Flags::kStart;
        map.change_flags(run, set, clear);
        for (auto it = taken; it != naive.end() && it->first < run.end(); ++it) {
          it->second.second = (it->second.second & ~clear) | set;
        }
      }
    }
    if (step % 5 == 0) map.reclaim();
    auto expected = naive.lower_bound(run.first);
    map.for_each({run.first, run.count + 700}, [&](const auto& extent) {
      for (uint64_t i = 0; i < extent.pages.count; ++i, ++expected) {
        ASSERT_EQ(expected->first, extent.pages.first + i) << step;
        ASSERT_EQ(expected->second.first, extent.target + i) << step;
        const uint64_t flags = i == 0 ? extent.flags : extent.flags & ~Flags::kStart;
        ASSERT_EQ(expected->second.second, flags) << step << " " << i;
        ASSERT_EQ(map.find(extent.pages.first + i).target(), extent.target + i);
        ASSERT_EQ(WordNear(map, extent.pages.first + i), NearWordOf(map, extent.pages.first + i))
            << step << " " << i;
      }
    });
    ASSERT_EQ(expected, naive.lower_bound(run.first + run.count + 700)) << step;
  }
}

TEST(PageMapTest, WhatIsWholeIsOneWordAndCanBeCut) {
  PageMap<FlatLeaves> map;
  constexpr uint64_t kChunk = 1 << 18;
  map.map({0, 3 * kChunk}, 1000, Flags::kRead);
  EXPECT_EQ(map.find(kChunk).left, kChunk);
  map.unmap({kChunk + 1000, 1});
  EXPECT_EQ(map.find(kChunk + 1000).word, 0u);
  EXPECT_EQ(map.find(kChunk + 1001).target(), 1000 + kChunk + 1001);
  EXPECT_EQ(map.find(kChunk + 512).left, 1u);
  EXPECT_EQ(map.find(kChunk + 1024).left, 512u);
  EXPECT_EQ(map.find(2 * kChunk).left, kChunk);
}

TEST(PageMapTest, LoopsSeeNothingWhereNothingIs) {
  PageMap<FlatLeaves> map;
  map.map({600, 1}, 7, Flags::kRead);
  map.map({5 * 512, 512}, 9, Flags::kWrite);
  for (const uint64_t page : {uint64_t{0}, uint64_t{601}, uint64_t{6 * 512}, uint64_t{1} << 20,
                              (uint64_t{1} << 32) + 600}) {
    EXPECT_EQ(WordNear(map, page), 0u) << page;
  }
  EXPECT_EQ(WordNear(map, 5 * 512 + 3), uint64_t{12} << kPageShift | Flags::kWrite);
}

// A granule whose leaf went elsewhere keeps what readers may still see of it, until nobody does.
TEST(PageMapTest, AnEntryThatDoesNotFitLeavesTheOthersWhereReadersFindThem) {
  PageMap<FlatLeaves> map;
  map.map({10, 1}, 77, Flags::kRead);
  const NearTargets near(map);
  const uint64_t looked_up = near.look_up(10);
  map.map({11, 1}, uint64_t{1} << 45, Flags::kRead);  // too large
  EXPECT_EQ(NearTargets::WordOf(looked_up) >> kPageShift, 77u);
  EXPECT_EQ(WordNear(map, 10), map.find(10).word & ~Flags::kStart);
  EXPECT_EQ(WordNear(map, 11) >> kPageShift, uint64_t{1} << 45);
  map.unmap({10, 2});
  map.map({12, 1}, 5, Flags::kRead);  // before reclaim(): not where the old entries are
  EXPECT_EQ(NearTargets::WordOf(looked_up) >> kPageShift, 77u);
  EXPECT_EQ(WordNear(map, 12) >> kPageShift, 5u);
  EXPECT_EQ(map.find(10).word, 0u);
  EXPECT_TRUE(map.has_retired());
  map.reclaim();
  EXPECT_FALSE(map.has_retired());
  EXPECT_EQ(NearTargets::WordOf(looked_up), 0u);
  EXPECT_EQ(map.find(12).target(), 5u);
  map.unmap({12, 1});
  map.map({12, 1}, 6, Flags::kRead);
  EXPECT_EQ(map.find(10).word, 0u);
  EXPECT_EQ(map.find(12).target(), 6u);
}

TEST(PageMapTest, AChunkOfLeavesMayGetARunAndLoseIt) {
  PageMap<FlatLeaves> map;
  map.map({3, 1}, 30, Flags::kRead);
  map.map({1024, 512}, 5000, Flags::kRead);
  EXPECT_EQ(WordNear(map, 1030) >> kPageShift, 5006u);
  EXPECT_EQ(WordNear(map, 3) >> kPageShift, 30u);
  map.unmap({1024, 512});
  EXPECT_EQ(WordNear(map, 1030), 0u);
  EXPECT_EQ(WordNear(map, 3) >> kPageShift, 30u);
  map.map({1024, 512}, 5000, Flags::kRead);
  map.unmap({1030, 1});  // now it is a leaf
  EXPECT_EQ(WordNear(map, 1030), 0u);
  EXPECT_EQ(WordNear(map, 1031) >> kPageShift, 5007u);
}

TEST(PageMapTest, TryMapTakesFreePagesOfLeavesAndNothingElse) {
  PageMap<FlatLeaves> map;
  EXPECT_FALSE(map.try_map(7, 1, Flags::kRead));  // no chunk yet
  map.map({8, 1}, 2, Flags::kRead);
  EXPECT_TRUE(map.try_map(7, 1, Flags::kRead));
  EXPECT_EQ(map.find(7).word, 1u << kPageShift | Flags::kRead | Flags::kStart);
  EXPECT_FALSE(map.try_map(7, 5, Flags::kRead));  // something is there
  EXPECT_EQ(map.find(7).target(), 1u);
  EXPECT_TRUE(map.try_map(600, 3, Flags::kRead));  // in a granule with nothing in it
  map.map({1024, 512}, 5000, Flags::kRead);
  EXPECT_FALSE(map.try_map(1030, 5, Flags::kRead));  // a run
  EXPECT_EQ(map.find(1030).target(), 5006u);
  EXPECT_FALSE(map.try_map(2048, uint64_t{1} << 41, Flags::kRead));  // does not fit
  EXPECT_EQ(map.find(2048).word, 0u);
  map.map({2049, 1}, uint64_t{1} << 41, Flags::kRead);
  EXPECT_FALSE(map.try_map(2048, 5, Flags::kRead));  // a leaf of whole words
  EXPECT_EQ(map.find(2048).word, 0u);
}

TEST(PageMapTest, SinglePagesThatCameAndWentLeaveAChunkAsItWas) {
  constexpr uint64_t kChunk = 1 << 18;
  PageMap<FlatLeaves> map;
  for (int round = 0; round < 2; ++round) {
    for (const uint64_t page : {7, 8, 700}) map.map({page, 1}, 100 + page, Flags::kRead);
    map.unmap({9, 1});  // where nothing is, in a leaf, in none, in no chunk
    map.unmap({5000, 1});
    map.unmap({kChunk + 7, 1});
    for (const uint64_t page : {7, 8, 700}) {
      EXPECT_EQ(map.find(page).target(), 100 + page);
      EXPECT_EQ(WordNear(map, page) >> kPageShift, 100 + page);
      EXPECT_FALSE(map.has_retired());
      map.unmap({page, 1});
      EXPECT_EQ(WordNear(map, page), 0u);
    }
    EXPECT_FALSE(map.has_retired());  // its node waits for the next ones
    map.map({0, kChunk}, 3 * kChunk, Flags::kRead);
    EXPECT_TRUE(map.has_retired());
    map.reclaim();
    EXPECT_EQ(map.find(0).left, kChunk);
    map.unmap({0, kChunk});
  }
}

TEST(FlatLeavesTest, WhatIsEmptyForLongGivesItsMemoryBackAndReadsAsNothing) {
  PageMap<FlatLeaves> map;
  constexpr uint64_t kGroup = 16 * 512;  // pages of a group
  for (uint64_t i = 0; i < 10; ++i) map.map({i * kGroup + 7, 1}, 70 + i, Flags::kRead);
  EXPECT_EQ(map.leaf_groups(), 10u);
  for (uint64_t i = 1; i < 10; ++i) map.unmap({i * kGroup + 7, 1});
  EXPECT_EQ(map.leaf_groups(), 10u);  // for a while
  // One that is used again and again keeps its memory; the others have been empty for too long.
  for (int round = 0; round < 200; ++round) {
    map.map({9 * kGroup + 7, 1}, 99, Flags::kRead);
    map.unmap({9 * kGroup + 7, 1});
    if (round > 180) {
      ASSERT_EQ(map.leaf_groups(), 2u) << round;
    }
  }
  EXPECT_EQ(map.find(7).target(), 70u);
  for (uint64_t i = 1; i < 10; ++i) {
    EXPECT_EQ(WordNear(map, i * kGroup + 7), 0u);
    map.map({i * kGroup + 7, 1}, 700 + i, Flags::kRead);
    EXPECT_EQ(WordNear(map, i * kGroup + 7) >> kPageShift, 700 + i);
  }
  EXPECT_EQ(map.leaf_groups(), 10u);
}

TEST(FlatLeavesTest, AGroupStaysWhileAnyOfItsLeavesIsInUse) {
  FlatLeaves leaves;
  ASSERT_NE(leaves.take(16), nullptr);
  FlatLeaves::Leaf* last = leaves.take(31);
  last->set(511, uint64_t{5} << kPageShift | Flags::kRead);
  leaves.put(16, nullptr, /*is_empty=*/true);
  leaves.pass(1 << 20);
  EXPECT_EQ(leaves.groups(), 1u);
  EXPECT_EQ(last->get(511), uint64_t{5} << kPageShift | Flags::kRead);
  last->set(511, 0);
  leaves.put(31, last, /*is_empty=*/true);
  EXPECT_EQ(leaves.groups(), 1u);
  leaves.pass(1 << 20);
  EXPECT_EQ(leaves.groups(), 0u);
}

// Bytes of anonymous huge pages in the mapping with this address (proc(5), smaps).
uint64_t HugeBytesAt(const void* address) {
  std::ifstream smaps("/proc/self/smaps");
  bool is_it = false;
  for (std::string line; std::getline(smaps, line);) {
    uint64_t from = 0;
    uint64_t to = 0;
    unsigned long kib = 0;
    if (std::sscanf(line.c_str(), "%" SCNx64 "-%" SCNx64 " ", &from, &to) == 2) {
      is_it =
          from <= reinterpret_cast<uintptr_t>(address) && reinterpret_cast<uintptr_t>(address) < to;
    } else if (is_it && std::sscanf(line.c_str(), "AnonHugePages: %lu kB", &kib) == 1) {
      return uint64_t{kib} << 10;
    }
  }
  return 0;
}

bool KernelCollapsesHugePages() {
  constexpr size_t kHuge = ReservedMemory::kHugePage;
  ReservedMemory memory(kHuge);
  memory.open(0, kHuge);
  std::memset(memory.data(), 1, kPageSize);
  memory.make_huge(0, kHuge);
  return HugeBytesAt(memory.data()) != 0;
}

// A window has 630 leaves.
TEST(FlatLeavesTest, WhereHalfOfTheLeavesOfAWindowWereInUseIsAHugePage) {
  if (!KernelCollapsesHugePages()) GTEST_SKIP() << "no MADV_COLLAPSE, or no huge page to be had";
  FlatLeaves leaves;
  for (uint64_t granule = 0; granule < 314; ++granule) leaves.take(granule)->set(5, kPageSize);
  EXPECT_EQ(leaves.huge_windows(), 0u);
  EXPECT_EQ(HugeBytesAt(leaves.leaves()), 0u);
  // One that comes again does not count twice.
  leaves.put(313, nullptr, /*is_empty=*/false);
  leaves.reclaim();
  ASSERT_NE(leaves.take(313), nullptr);
  EXPECT_EQ(leaves.huge_windows(), 0u);
  ASSERT_NE(leaves.take(500), nullptr);
  EXPECT_EQ(leaves.huge_windows(), 1u);
  EXPECT_EQ(HugeBytesAt(leaves.leaves()), ReservedMemory::kHugePage);
  for (uint64_t granule = 0; granule < 313; ++granule) {
    ASSERT_EQ(leaves.leaves()[granule].get(5), kPageSize) << granule;
  }
}

TEST(FlatLeavesTest, AWindowThatGaveMemoryBackIsMadeHugeAgainButNotSoSoon) {
  FlatLeaves leaves;
  const auto take_half = [&leaves] {
    for (uint64_t granule = 0; granule < 320; ++granule) ASSERT_NE(leaves.take(granule), nullptr);
  };
  const auto put_half = [&leaves] {
    for (uint64_t granule = 0; granule < 320; ++granule) {
      leaves.put(granule, nullptr, /*is_empty=*/true);
    }
  };
  take_half();
  EXPECT_EQ(leaves.huge_windows(), 1u);
  put_half();
  leaves.pass(1000);  // long enough for 20 groups
  EXPECT_EQ(leaves.groups(), 0u);
  EXPECT_EQ(leaves.huge_windows(), 0u);
  take_half();
  EXPECT_EQ(leaves.huge_windows(), 0u);
  leaves.pass(1 << 16);
  ASSERT_NE(leaves.take(400), nullptr);  // one leaf more, in time
  EXPECT_EQ(leaves.huge_windows(), 1u);
}

TEST(FlatLeavesTest, ThereAreNoneFrom16TiBOn) {
  FlatLeaves leaves;
  EXPECT_NE(leaves.take(FlatLeaves::kNearGranules - 1), nullptr);
  EXPECT_EQ(leaves.take(FlatLeaves::kNearGranules), nullptr);
}

TEST(FlatLeavesTest, EveryEntryOfALeafHasAPlaceOfItsOwnWithinOneLine) {
  FlatLeaves leaves;
  FlatLeaves::Leaf* leaf = leaves.take(5);
  for (size_t i = 0; i < kLeafEntries; ++i) {
    leaf->set(i, (uint64_t{0xfedcba0000} + i) << kPageShift | Flags::kAllFlags);
    const auto at = reinterpret_cast<uintptr_t>(leaf->at(i));
    EXPECT_EQ(at / 64, (at + 5) / 64) << i;
  }
  for (size_t i = 0; i < kLeafEntries; ++i) {
    EXPECT_EQ(leaf->get(i), (uint64_t{0xfedcba0000} + i) << kPageShift | Flags::kAllFlags) << i;
  }
}

TEST(ReverseMapTest, AgreesWithAMultimap) {
  ReverseMap map;
  std::multimap<uint64_t, uint64_t> naive;  // device -> iova
  struct Added {
    PageRun iova;
    uint64_t device;
  };
  std::vector<Added> added;
  std::mt19937_64 random(3);
  uint64_t next_iova = 0;
  for (int step = 0; step < 3000; ++step) {
    if (added.size() < 40 || random() % 2 == 0) {
      const PageRun iova{next_iova, 1 + random() % 30};
      next_iova += iova.count + random() % 5;
      const uint64_t device = (random() % 3 == 0 ? uint64_t{1} << 35 : 500) + random() % 300;
      map.add(iova, device);
      added.push_back({iova, device});
      for (uint64_t i = 0; i < iova.count; ++i) naive.emplace(device + i, iova.first + i);
    } else {
      Added& one = added[random() % added.size()];
      // A part from its start on, or all.
      const uint64_t count = 1 + random() % one.iova.count;
      map.remove({one.iova.first, count}, one.device);
      for (uint64_t i = 0; i < count; ++i) {
        auto it = naive.lower_bound(one.device + i);
        while (it->second != one.iova.first + i) ++it;
        naive.erase(it);
      }
      one = {{one.iova.first + count, one.iova.count - count}, one.device + count};
      if (one.iova.count == 0) {
        one = added.back();
        added.pop_back();
      }
    }
    const uint64_t device = 500 + random() % 330;
    std::vector<uint64_t> found;
    map.for_each(device, [&found](uint64_t page) { found.push_back(page); });
    std::sort(found.begin(), found.end());
    std::vector<uint64_t> expected;
    for (auto [it, end] = naive.equal_range(device); it != end; ++it)
      expected.push_back(it->second);
    std::sort(expected.begin(), expected.end());
    ASSERT_EQ(found, expected) << step;
  }
}

TEST(RevokedHoldsTest, AHoldOwesNothingWhereItsPageWasRevokedSince) {
  RevokedHolds holds;
  holds.add({10, 10}, 2, /*epoch=*/1);
  holds.add({15, 10}, 1, /*epoch=*/2);
  EXPECT_TRUE(holds.any({0, 100}, 0));
  EXPECT_TRUE(holds.any({0, 100}, 1));
  EXPECT_FALSE(holds.any({0, 15}, 1));
  EXPECT_FALSE(holds.any({0, 100}, 2));
  std::vector<PageRun> real;
  holds.release({5, 25}, 1, &real);
  EXPECT_EQ(real, (std::vector<PageRun>{{5, 10}, {25, 5}}));
  real.clear();
  holds.release({8, 12}, 0, &real);
  holds.release({10, 10}, 0, &real);
  EXPECT_EQ(real, (std::vector<PageRun>{{8, 2}}));
  EXPECT_TRUE(holds.empty());
}

}  // namespace
}  // namespace mvgpu::dma
