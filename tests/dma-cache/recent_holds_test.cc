// The table of pages that a user maps again and again, against a map of pages.

#include "dma-cache/recent_holds.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <utility>
#include <vector>

namespace mvgpu::dma {
namespace {

using ::testing::ElementsAre;
using ::testing::UnorderedElementsAre;

constexpr uint64_t kPlaces = uint64_t{1} << 17;
constexpr uint64_t kPagesOfTags = (uint64_t{1} << 33) - kPlaces;  // behind them tags are too long
constexpr uint64_t kMostHolds = 4095;
constexpr int kLongestPause = 63;

class RecentHoldsTest : public ::testing::Test {
 protected:
  using Taken = std::vector<std::pair<uint64_t, uint64_t>>;  // pages, holds

  static std::vector<Iova> IovasOf(const std::vector<uint64_t>& pages) {
    std::vector<Iova> iovas;
    for (const uint64_t page : pages) iovas.emplace_back(BytesIn(page) + 0x123);
    return iovas;
  }
  uint64_t Add(const std::vector<uint64_t>& pages) {
    addresses_.assign(pages.size(), DmaAddr(0));
    return recent_.add(IovasOf(pages), addresses_);
  }
  uint64_t Remove(const std::vector<uint64_t>& pages) { return recent_.remove(IovasOf(pages)); }
  bool Enter(uint64_t page) { return recent_.enter(page, AddressFor(page)); }
  static DmaAddr AddressFor(uint64_t page) {
    return DmaAddr(BytesIn((page * 7 + 5) & ((uint64_t{1} << 36) - 1)) + 0x7);
  }
  Taken Take(PageRun run) {
    Taken taken;
    recent_.take(run, [&taken](uint64_t page, uint64_t holds) { taken.emplace_back(page, holds); });
    return taken;
  }
  // Another page with the same place.
  static uint64_t RivalOf(uint64_t page) {
    const uint64_t tag = (page >> 17) + 1;
    const uint64_t other = tag + 1;
    const uint64_t low = page % kPlaces ^ tag * 0x9e35 % kPlaces ^ other * 0x9e35 % kPlaces;
    return (other - 1) << 17 | low;
  }

  RecentHolds recent_;
  std::vector<DmaAddr> addresses_;
};

TEST_F(RecentHoldsTest, NothingIsHereAtFirst) {
  EXPECT_EQ(Add({1, 2, 3}), 7u);
  EXPECT_TRUE(recent_.is_open());
  EXPECT_EQ(Remove({1, 2, 3}), 7u);
  EXPECT_THAT(Take({0, kPlaces * 4}), ElementsAre());
}

TEST_F(RecentHoldsTest, APageThatEnteredIsAddedAndRemovedWithTheOffsetOfTheAddress) {
  ASSERT_TRUE(Enter(9));
  EXPECT_EQ(Add({9, 9, 8}), 4u);
  EXPECT_EQ(addresses_[0], DmaAddr(AddressFor(9).value() - 7 + 0x123));
  EXPECT_EQ(addresses_[1], addresses_[0]);
  EXPECT_EQ(Remove({9, 8, 9, 9, 9}), 0b10010u);
  EXPECT_EQ(Add({9}), 0u);  // without holds it is still here
  EXPECT_THAT(Take({9, 1}), ElementsAre(std::pair(9u, 1u)));
  EXPECT_EQ(Add({9}), 1u);
}

TEST_F(RecentHoldsTest, APageTakesThePlaceOfOneWithoutHoldsOnly) {
  const uint64_t rival = RivalOf(1234);
  ASSERT_TRUE(Enter(1234));
  EXPECT_FALSE(Enter(rival));
  EXPECT_EQ(Add({rival}), 1u);
  EXPECT_EQ(Remove({rival}), 1u);
  ASSERT_EQ(Remove({1234}), 0u);
  EXPECT_TRUE(Enter(rival));
  EXPECT_EQ(Remove({1234}), 1u);
  EXPECT_THAT(Take({1234, 1}), ElementsAre());
  EXPECT_THAT(Take({rival, 1}), ElementsAre(std::pair(rival, 1u)));
  EXPECT_TRUE(Enter(1234));
}

TEST_F(RecentHoldsTest, PagesBeyondTheLongestTagDoNotEnterAndAreNotTakenForOthers) {
  const uint64_t last = kPagesOfTags - 1;
  EXPECT_TRUE(Enter(last));
  EXPECT_EQ(Add({last}), 0u);
  EXPECT_EQ(addresses_[0], DmaAddr(AddressFor(last).value() - 7 + 0x123));
  for (const uint64_t page : {kPagesOfTags, uint64_t{1} << 33, (uint64_t{1} << 33) + 9,
                              last + (uint64_t{1} << 33), (uint64_t{1} << 52) - 1}) {
    EXPECT_FALSE(Enter(page)) << page;
    EXPECT_EQ(Add({page, last}), 1u) << page;
    EXPECT_EQ(Remove({page, last}), 1u) << page;
    EXPECT_THAT(Take({page, 1}), ElementsAre()) << page;
  }
  EXPECT_THAT(Take({0, uint64_t{1} << 52}), ElementsAre(std::pair(last, 2u)));
}

// What an empty place looks like is no page's tag, though a page may have the same lower bits.
TEST_F(RecentHoldsTest, AnEmptyPlaceIsNobodys) {
  ASSERT_TRUE(Enter(5));
  for (const uint64_t page : {uint64_t{0}, (uint64_t{1} << 52) - kPlaces, kPagesOfTags + 5}) {
    EXPECT_EQ(Add({page, 5}), 1u) << page;
  }
}

TEST_F(RecentHoldsTest, AddressesBeyond48BitsDoNotEnter) {
  EXPECT_FALSE(recent_.enter(1, DmaAddr(uint64_t{1} << 48)));
  EXPECT_FALSE(recent_.enter(1, DmaAddr(UINT64_MAX)));
  EXPECT_EQ(Add({1}), 1u);
  EXPECT_TRUE(recent_.enter(1, DmaAddr((uint64_t{1} << 48) - 1)));
  EXPECT_EQ(Add({1}), 0u);
  EXPECT_EQ(addresses_[0], DmaAddr((uint64_t{1} << 48) - kPageSize + 0x123));
  EXPECT_THAT(Take({1, 1}), ElementsAre(std::pair(1u, 2u)));
}

TEST_F(RecentHoldsTest, HoldsThatDoNotFitAreLeftToTheCounters) {
  ASSERT_TRUE(Enter(77));
  for (uint64_t holds = 1; holds < kMostHolds; ++holds) ASSERT_EQ(Add({77}), 0u) << holds;
  EXPECT_EQ(Add({77}), 1u);
  EXPECT_TRUE(recent_.is_open());
  EXPECT_EQ(Remove({77}), 0u);
  EXPECT_EQ(Add({77}), 1u);  // a miss is followed by a pause
  EXPECT_FALSE(recent_.is_open());
  EXPECT_EQ(Add({77, 77}), 2u);  // one more fits, not two
  EXPECT_THAT(Take({77, 1}), ElementsAre(std::pair(77u, kMostHolds)));
}

TEST_F(RecentHoldsTest, TakeFindsAllOfARunAndNothingBesideIt) {
  // Shorter than the table, as long, longer.
  for (const uint64_t count : {uint64_t{1}, uint64_t{10}, kPlaces - 1, kPlaces, 3 * kPlaces}) {
    RecentHolds recent;
    const uint64_t first = 5 * kPlaces + 17;
    Taken inside;
    for (const uint64_t page : {first, first + count / 2, first + count - 1}) {
      if (recent.enter(page, DmaAddr(BytesIn(page)))) inside.emplace_back(page, 1);
    }
    ASSERT_TRUE(recent.enter(first - 1, DmaAddr(0)));
    ASSERT_TRUE(recent.enter(first + count, DmaAddr(0)));
    Taken taken;
    const auto visit = [&taken](uint64_t page, uint64_t holds) { taken.emplace_back(page, holds); };
    recent.take({first, count}, visit);
    EXPECT_THAT(taken, ::testing::UnorderedElementsAreArray(inside)) << count;
    taken.clear();
    recent.take({0, uint64_t{1} << 40}, visit);
    EXPECT_THAT(taken, UnorderedElementsAre(std::pair(first - 1, 1u), std::pair(first + count, 1u)))
        << count;
  }
}

TEST_F(RecentHoldsTest, PagesWithoutHoldsGoWithoutAWord) {
  ASSERT_TRUE(Enter(3));
  ASSERT_EQ(Remove({3}), 0u);
  EXPECT_THAT(Take({3, 1}), ElementsAre());
  EXPECT_EQ(Add({3}), 1u);
}

// 0, 1, 3, 7 ... 63 batches, however many batches that miss there were.
TEST_F(RecentHoldsTest, WhereMostOfABatchIsNotHereSomeOfThoseBehindItAreNotLookedAt) {
  ASSERT_TRUE(Enter(1));
  for (int pause = 1, rounds = 0; rounds < 9; ++rounds) {
    EXPECT_EQ(Add({1, 2, 3}), 6u);
    EXPECT_TRUE(recent_.is_open());
    for (int i = 0; i < pause; ++i) {
      EXPECT_EQ(Add({1}), 1u) << pause;
      EXPECT_FALSE(recent_.is_open());
    }
    pause = std::min(2 * pause + 1, kLongestPause);
  }
  // Half of it is enough, and the next pause is a short one.
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(Add({1, 2}), 2u);
    EXPECT_TRUE(recent_.is_open());
  }
  EXPECT_EQ(Add({1, 2, 3}), 6u);
  EXPECT_EQ(Add({1}), 1u);
  EXPECT_EQ(Add({1}), 0u);
  EXPECT_THAT(Take({1, 1}), ElementsAre(std::pair(1u, 1 + 9 + 3 + 2u)));
}

TEST_F(RecentHoldsTest, RemovesAreLookedAtAlsoInAPause) {
  ASSERT_TRUE(Enter(1));
  EXPECT_EQ(Add({1, 2, 3}), 6u);
  EXPECT_EQ(Remove({1, 1}), 0u);
  EXPECT_FALSE(Add({1}) == 0);
  EXPECT_EQ(Remove({1}), 1u);
}

// The model: where each page may be, its address and its holds.
struct Model {
  struct Place {
    uint64_t page;
    DmaAddr address;
    uint64_t holds;
  };
  static uint64_t PlaceOf(uint64_t page) { return (page ^ ((page >> 17) + 1) * 0x9e35) % kPlaces; }
  Place* find(uint64_t page) {
    const auto it = places.find(PlaceOf(page));
    return it != places.end() && it->second.page == page ? &it->second : nullptr;
  }
  bool enter(uint64_t page, DmaAddr address) {
    if (page >= kPagesOfTags || address.value() >> 48 != 0) return false;
    const auto it = places.find(PlaceOf(page));
    if (it != places.end() && it->second.holds != 0) return false;
    places.insert_or_assign(PlaceOf(page), Place{page, address, 1});
    return true;
  }
  bool add(uint64_t page, DmaAddr* address) {
    Place* const place = find(page);
    if (place == nullptr || place->holds == kMostHolds) return false;
    ++place->holds;
    *address = place->address;
    return true;
  }
  bool remove(uint64_t page) {
    Place* const place = find(page);
    if (place == nullptr || place->holds == 0) return false;
    --place->holds;
    return true;
  }
  std::map<uint64_t, uint64_t> take(PageRun run) {
    std::map<uint64_t, uint64_t> taken;
    std::erase_if(places, [&](const auto& entry) {
      const Place& place = entry.second;
      if (!run.contains(place.page)) return false;
      if (place.holds != 0) taken.emplace(place.page, place.holds);
      return true;
    });
    return taken;
  }

  std::map<uint64_t, Place> places;
};

class RecentHoldsModelTest : public RecentHoldsTest,
                             public ::testing::WithParamInterface<unsigned> {};

TEST_P(RecentHoldsModelTest, AgreesWithAMap) {
  std::mt19937_64 random(GetParam());
  Model model;
  // Pages whose places collide, neighbours, and some without a tag.
  std::vector<uint64_t> pool;
  for (uint64_t page :
       {uint64_t{0}, kPlaces - 2, 9 * kPlaces, kPagesOfTags - 3, random() % kPagesOfTags}) {
    for (int i = 0; i < 4; ++i) pool.push_back(page++);
    for (int i = 0; i < 3; ++i) pool.push_back(RivalOf(pool[pool.size() - 1]));
  }
  uint64_t hits = 0;
  uint64_t refused = 0;
  for (int step = 0; step < 20000; ++step) {
    std::vector<uint64_t> pages(1 + random() % (step % 3 == 0 ? 64 : 4));
    for (uint64_t& page : pages) page = pool[random() % pool.size()];
    switch (random() % 8) {
      case 0:
      case 1: {
        const DmaAddr address(random() >> (random() % 16 == 0 ? 8 : 20));
        const bool entered = model.enter(pages[0], DmaAddr(address.value() & ~kPageMask));
        ASSERT_EQ(recent_.enter(pages[0], address), entered) << step;
        refused += entered ? 0 : 1;
        break;
      }
      case 2:
      case 3:
      case 4: {
        const uint64_t missed = Add(pages);
        if (!recent_.is_open()) {
          ASSERT_EQ(missed, LowestBits(pages.size()));
          break;
        }
        for (size_t i = 0; i < pages.size(); ++i) {
          DmaAddr address(0);
          const bool added = model.add(pages[i], &address);
          ASSERT_EQ((missed >> i & 1) == 0, added) << step;
          if (added) {
            ASSERT_EQ(addresses_[i], DmaAddr(address.value() + 0x123)) << step;
          }
          hits += added ? 1 : 0;
        }
        break;
      }
      case 5:
      case 6: {
        const uint64_t missed = Remove(pages);
        for (size_t i = 0; i < pages.size(); ++i) {
          ASSERT_EQ((missed >> i & 1) == 0, model.remove(pages[i])) << step;
        }
        break;
      }
      default: {
        if (random() % 4 != 0) break;
        const uint64_t back = std::min<uint64_t>(pages[0], random() % 3);
        const uint64_t count = 1 + random() % (random() % 8 == 0 ? 3 * kPlaces : 8);
        std::map<uint64_t, uint64_t> taken;
        for (const auto& [page, holds] : Take({pages[0] - back, count})) {
          ASSERT_TRUE(taken.emplace(page, holds).second);
        }
        ASSERT_EQ(taken, model.take({pages[0] - back, count})) << step;
      }
    }
  }
  EXPECT_GT(hits, 1000u);
  EXPECT_GT(refused, 100u);
  const auto rest = model.take({0, uint64_t{1} << 40});
  EXPECT_THAT(Take({0, uint64_t{1} << 40}),
              ::testing::UnorderedElementsAreArray(rest.begin(), rest.end()));
}

INSTANTIATE_TEST_SUITE_P(Seeds, RecentHoldsModelTest, ::testing::Range(1u, 5u));

}  // namespace
}  // namespace mvgpu::dma
