// Pins of single pages in batches, counts without end, and pins of every size.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "tests/apionly-domain/domain_fixture.h"

namespace mvgpu::domain {
namespace {

using testing::FailsWith;
using testing::GuestRam;
using ::testing::HasSubstr;
using testing::IsOk;
using testing::MakeRange;

constexpr uint64_t kLastPageStart = UINT64_MAX & ~kPageMask;
constexpr uint64_t kBeyond16TiB = uint64_t{1} << 44;

class PinBatchTest : public DomainTest {
 protected:
  static std::vector<Iova> PagesAt(std::initializer_list<uint64_t> pages) {
    std::vector<Iova> iovas;
    for (const uint64_t page : pages) iovas.push_back(Iova(BytesIn(page)));
    return iovas;
  }
  static std::vector<Iova> Times(uint64_t count, Iova page) {
    return std::vector<Iova>(count, page);
  }
  Result<void> Unpin(std::span<const Iova> pages, Access access = Access::kReadWrite) {
    return context_->unpin_pages(pages, access);
  }
  void ExpectNothingHeld() {
    EXPECT_EQ(PagesPinnedOnce(), 0u);
    EXPECT_EQ(domain_->counters().unique_pages, 0u);
    EXPECT_EQ(domain_->counters().pinned_pages, 0u);
  }
};

TEST_F(PinBatchTest, EachAddressIsTranslatedAndEachPageHeldOnce) {
  Map(BytesIn(10), BytesIn(3), BytesIn(8));
  const std::vector<Iova> pages = {Iova(BytesIn(12) + 5), Iova(BytesIn(10)), Iova(BytesIn(17))};
  ASSERT_THAT(PinPages(pages), IsOk());
  EXPECT_EQ(PagesPinnedOnce(), 3u);
  EXPECT_EQ(hosts_[0] - hosts_[1], static_cast<std::ptrdiff_t>(BytesIn(2) + 5));
  EXPECT_EQ(hosts_[2] - hosts_[1], static_cast<std::ptrdiff_t>(BytesIn(7)));
  const std::vector<std::byte*> first = hosts_;
  ASSERT_THAT(PinPages(pages), IsOk());  // hits now
  EXPECT_EQ(hosts_, first);
  EXPECT_EQ(PagesPinnedOnce(), 3u);
  EXPECT_EQ(domain_->counters().pinned_pages, 6u);
  ASSERT_THAT(Unpin(pages), IsOk());
  EXPECT_EQ(PagesPinnedOnce(), 3u);
  ASSERT_THAT(Unpin(pages), IsOk());
  ExpectNothingHeld();
}

TEST_F(PinBatchTest, DuplicatesCountEach) {
  Map(0, 0, BytesIn(8));
  const auto pages = PagesAt({3, 3, 1, 3});
  ASSERT_THAT(PinPages(pages), IsOk());
  EXPECT_EQ(domain_->counters().pinned_pages, 4u);
  EXPECT_EQ(PagesPinnedOnce(), 2u);
  ASSERT_THAT(Unpin(PagesAt({3, 3})), IsOk());
  EXPECT_EQ(PagesPinnedOnce(), 2u) << "page 3 is still held";
  ASSERT_THAT(Unpin(PagesAt({1, 3})), IsOk());
  ExpectNothingHeld();
}

// PFN carry between batches was corrupted once (13a0d1ae7ee6).
TEST_F(PinBatchTest, SizesAroundABatchHoldEveryPageOnceAcrossMappingsThatJump) {
  Map(0, 0, BytesIn(50));
  Map(BytesIn(50), BytesIn(100), BytesIn(50));
  Map(BytesIn(100), BytesIn(50), BytesIn(50));
  for (const uint64_t size : {1u, 2u, 3u, 63u, 64u, 65u, 127u, 128u, 129u, 150u}) {
    SCOPED_TRACE(size);
    std::vector<Iova> pages;
    for (uint64_t i = 0; i < size; ++i) pages.push_back(Iova(BytesIn(i)));
    ASSERT_THAT(PinPages(pages), IsOk());
    EXPECT_EQ(PagesPinnedOnce(), size);
    for (uint64_t i = 0; i < size; ++i) {
      const uint64_t file_page = i < 50 ? i : i < 100 ? i + 50 : i - 50;
      ASSERT_EQ(hosts_[i] - hosts_[0], static_cast<std::ptrdiff_t>(BytesIn(file_page))) << i;
    }
    std::reverse(pages.begin(), pages.end());
    ASSERT_THAT(Unpin(pages), IsOk());
    ExpectNothingHeld();
  }
}

TEST_F(PinBatchTest, HitsAndMissesMayMix) {
  Map(0, 0, BytesIn(16));
  ASSERT_THAT(PinPages(PagesAt({0, 2, 4})), IsOk());
  ASSERT_THAT(PinPages(PagesAt({0, 1, 2, 3, 4, 5})), IsOk());
  EXPECT_EQ(PagesPinnedOnce(), 6u);
  ASSERT_THAT(Unpin(PagesAt({5, 4, 3, 2, 1, 0})), IsOk());
  EXPECT_EQ(PagesPinnedOnce(), 3u);
  ASSERT_THAT(Unpin(PagesAt({4, 2, 0})), IsOk());
  ExpectNothingHeld();
}

TEST_F(PinBatchTest, HoldsOfOnePageNeverOverflow) {
  Map(0, 0, BytesIn(4));
  for (const uint64_t count : {64u, 65u, 253u, 254u, 255u, 256u, 257u, 511u, 70000u}) {
    SCOPED_TRACE(count);
    const auto pages = Times(count, Iova(BytesIn(1)));
    ASSERT_THAT(PinPages(pages), IsOk());
    EXPECT_EQ(domain_->counters().pinned_pages, count);
    EXPECT_EQ(PagesPinnedOnce(), 1u);
    ASSERT_THAT(Unpin(std::span(pages).first(count - 1)), IsOk());
    EXPECT_EQ(PagesPinnedOnce(), 1u) << "one hold is left";
    ASSERT_THAT(Unpin(PagesAt({1})), IsOk());
    ExpectNothingHeld();
    EXPECT_THAT(Unpin(PagesAt({1})), FailsWith(ErrorCode::kInvalid));
  }
}

TEST_F(PinBatchTest, AFailureAtAnyStepRollsBackTheWholeBatch) {
  Map(0, 0, BytesIn(200));
  std::vector<Iova> pages;
  for (uint64_t i = 0; i < 150; ++i) pages.push_back(Iova(BytesIn((i * 7) % 150)));
  ASSERT_THAT(PinPages(PagesAt({0, 70, 149})), IsOk());  // hits among them
  for (uint64_t n = 1; n <= 147; ++n) {
    SCOPED_TRACE(n);
    pins_->fail_at_call = n;
    ASSERT_THAT(PinPages(pages), FailsWith(ErrorCode::kLimit));
    ASSERT_EQ(PagesPinnedOnce(), 3u);
    ASSERT_EQ(domain_->counters().pinned_pages, 3u);
  }
  pins_->fail_at_call = 148;  // there is no such step
  EXPECT_THAT(PinPages(pages), IsOk());
  pins_->fail_at_call = 0;
  EXPECT_EQ(domain_->counters().pinned_pages, 153u);
  EXPECT_THAT(Unpin(pages), IsOk());
  EXPECT_THAT(Unpin(PagesAt({0, 70, 149})), IsOk());
  ExpectNothingHeld();
}

TEST_F(PinBatchTest, WhatWasRefusedHalfWayIsInNoFigure) {
  Map(0, 0, BytesIn(200));
  std::vector<Iova> pages;
  for (uint64_t i = 0; i < 150; ++i) pages.push_back(Iova(BytesIn(i)));
  ASSERT_THAT(PinPages(PagesAt({0, 64, 149})), IsOk());  // a hit in every batch
  const auto before = domain_->counters();
  for (const uint64_t n : {1u, 50u, 64u, 100u, 147u}) {
    SCOPED_TRACE(n);
    pins_->fail_at_call = n;
    ASSERT_THAT(PinPages(pages), FailsWith(ErrorCode::kLimit));
    EXPECT_EQ(domain_->counters().pin_calls, before.pin_calls);
    EXPECT_EQ(domain_->counters().pages_pinned, before.pages_pinned);
  }
  pins_->fail_at_call = 0;
  ASSERT_THAT(PinPages(pages), IsOk());
  EXPECT_EQ(domain_->counters().pin_calls, before.pin_calls + 3 + 147) << "batches and misses";
  EXPECT_EQ(domain_->counters().pages_pinned, before.pages_pinned + 150);
  ASSERT_THAT(Unpin(pages), IsOk());
  ASSERT_THAT(Unpin(PagesAt({0, 64, 149})), IsOk());
  ExpectNothingHeld();
}

// Counters of pages below 16 TiB are found by their number alone: that of a page above must not be
// taken for one of them.
TEST_F(PinBatchTest, PagesThatLie16TiBApartAreNotConfused) {
  Map(BytesIn(7), 0, BytesIn(4));
  Map(kBeyond16TiB + BytesIn(7), BytesIn(8), BytesIn(4));
  const Iova near(BytesIn(8));
  const Iova far(kBeyond16TiB + BytesIn(8));
  const std::vector<Iova> both = {far, near, far};
  ASSERT_THAT(PinPages(Times(2, near)), IsOk());
  EXPECT_THAT(Unpin(Times(1, far)), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(Unpin(Times(2, far)), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(Unpin(both), FailsWith(ErrorCode::kInvalid));
  EXPECT_EQ(domain_->counters().pinned_pages, 2u);
  EXPECT_EQ(PagesPinnedOnce(), 1u);
  ASSERT_THAT(PinPages(Times(1, far)), IsOk());
  EXPECT_EQ(PagesPinnedOnce(), 2u) << "another page";
  ASSERT_THAT(PinPages(both), IsOk());
  ASSERT_THAT(Unpin(both), IsOk());
  ASSERT_THAT(Unpin(Times(1, far)), IsOk());
  ASSERT_THAT(Unpin(Times(2, near)), IsOk());
  ExpectNothingHeld();
}

TEST_F(PinBatchTest, APageThatCannotBePinnedRefusesTheBatch) {
  Map(0, 0, BytesIn(100));
  Map(BytesIn(100), 0, BytesIn(1), Access::kRead);
  MapWithoutFile(BytesIn(101), kPageSize);
  std::vector<Iova> pages;
  for (uint64_t i = 0; i < 100; ++i) pages.push_back(Iova(BytesIn(i)));
  const auto refuses = [&](uint64_t page, ErrorCode code) {
    for (const size_t place : {0u, 63u, 64u, 99u}) {
      SCOPED_TRACE(place);
      std::vector<Iova> bad = pages;
      bad[place] = Iova(BytesIn(page));
      EXPECT_THAT(PinPages(bad), FailsWith(code));
      ExpectNothingHeld();
    }
  };
  refuses(100, ErrorCode::kPermission);
  refuses(101, ErrorCode::kNotReachable);
  refuses(102, ErrorCode::kNotMapped);
}

TEST_F(PinBatchTest, ReleasingWhatIsNotHeldIsRefusedAndNamesThePage) {
  Map(0, 0, BytesIn(100));
  ASSERT_THAT(PinPages(PagesAt({1, 2, 2})), IsOk());
  const auto refused = Unpin(PagesAt({1, 2, 3}));
  ASSERT_THAT(refused, FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(refused.error().message(), HasSubstr("holder releases iova 0x3000"));
  EXPECT_THAT(Unpin(PagesAt({2, 2, 2})), FailsWith(ErrorCode::kInvalid)) << "once too often";
  EXPECT_THAT(Unpin(PagesAt({1}), Access::kRead), FailsWith(ErrorCode::kInvalid))
      << "held for writing, not for reading";
  EXPECT_THAT(Unpin({}), IsOk());
  EXPECT_EQ(domain_->counters().pinned_pages, 3u) << "refusals release nothing";
  EXPECT_THAT(Unpin(PagesAt({2, 1, 2})), IsOk());
  ExpectNothingHeld();
}

// In type1 any device of the container can drop another's reference.
TEST_F(PinBatchTest, OnlyTheContextThatPinnedCanRelease) {
  Map(0, 0, BytesIn(4));
  ASSERT_THAT(PinPages(PagesAt({1})), IsOk());
  EXPECT_THAT(other_context_->unpin_pages(PagesAt({1}), Access::kReadWrite),
              FailsWith(ErrorCode::kInvalid));
  const auto sibling = domain_->open_context(&owner_);
  EXPECT_THAT(sibling->unpin_pages(PagesAt({1}), Access::kReadWrite),
              FailsWith(ErrorCode::kInvalid));
  EXPECT_EQ(PagesPinnedOnce(), 1u);
  EXPECT_THAT(Unpin(PagesAt({1})), IsOk());
}

TEST_F(PinBatchTest, ContextsShareThePinAndTheLastOneLetsGo) {
  Map(0, 0, BytesIn(4));
  ASSERT_THAT(PinPages(PagesAt({1})), IsOk());
  {
    auto theirs = other_context_->pin(MakeRange(0, BytesIn(4)), Access::kRead);
    ASSERT_THAT(theirs, IsOk());
    EXPECT_EQ(PagesPinnedOnce(), 4u);
    ASSERT_THAT(Unpin(PagesAt({1})), IsOk());
    EXPECT_EQ(PagesPinnedOnce(), 4u);
    EXPECT_EQ(domain_->counters().peak_unique_pages, 4u);
  }
  ExpectNothingHeld();
}

TEST_F(PinBatchTest, IovasAbove16TiBAndTheLastPageWork) {
  Map(kBeyond16TiB - BytesIn(2), 0, BytesIn(4));
  Map(kLastPageStart - kPageSize, BytesIn(4), BytesIn(2));
  const std::vector<Iova> pages = {Iova(kBeyond16TiB - 1), Iova(kBeyond16TiB), Iova(UINT64_MAX)};
  ASSERT_THAT(PinPages(pages), IsOk());
  EXPECT_EQ(PagesPinnedOnce(), 3u);
  auto across = Pin(kBeyond16TiB - BytesIn(2), BytesIn(4));
  ASSERT_THAT(across, IsOk());
  EXPECT_EQ(across->runs().size(), 1u);
  auto last = Pin(kLastPageStart - kPageSize, BytesIn(2));
  ASSERT_THAT(last, IsOk());
  EXPECT_EQ(last->runs()[0].iova.last(), Iova(UINT64_MAX));
  EXPECT_EQ(domain_->holders(MakeRange(kLastPageStart, kPageSize)).size(), 1u);
  ASSERT_THAT(Unpin(pages), IsOk());
  across->reset();
  EXPECT_EQ(PagesPinnedOnce(), 2u);
  last->reset();
  ExpectNothingHeld();
}

// Up to 512 pages are counted by page, more as runs: both may hold a page.
TEST_F(PinBatchTest, LargeAndSmallPinsOfTheSamePagesGoInAnyOrder) {
  Map(0, 0, BytesIn(1024));
  for (const int order : {0, 1, 2, 3, 4, 5}) {
    SCOPED_TRACE(order);
    auto large = Pin(0, BytesIn(1000));
    auto small = Pin(BytesIn(500), BytesIn(512));
    ASSERT_THAT(large, IsOk());
    ASSERT_THAT(small, IsOk());
    ASSERT_THAT(PinPages(PagesAt({0, 600, 1011})), IsOk());
    EXPECT_EQ(PagesPinnedOnce(), 1012u);
    std::vector<int> steps = {0, 1, 2};
    for (int i = 0; i < order; ++i) std::next_permutation(steps.begin(), steps.end());
    for (const int step : steps) {
      if (step == 0) large->reset();
      if (step == 1) small->reset();
      if (step == 2) {
        ASSERT_THAT(Unpin(PagesAt({0, 600, 1011})), IsOk());
      }
      PagesPinnedOnce();
    }
    ExpectNothingHeld();
  }
}

TEST_F(PinBatchTest, PartsOfALargePinAreReleasedBesideSmallOnes) {
  Map(0, 0, BytesIn(1024));
  auto large = Pin(0, BytesIn(1024));
  ASSERT_THAT(large, IsOk());
  ASSERT_THAT(PinPages(PagesAt({599, 600})), IsOk());
  PinnedRange tail = large->split_off(Iova(BytesIn(600)));
  tail.reset();
  EXPECT_EQ(PagesPinnedOnce(), 601u);
  EXPECT_EQ(pins_->pages.count({GuestFile::IdentityOf(ram_.fd())->inode, 600}), 1u);
  large->reset();
  EXPECT_EQ(PagesPinnedOnce(), 2u);
  ASSERT_THAT(Unpin(PagesAt({600, 599})), IsOk());
  ExpectNothingHeld();
}

TEST_F(PinBatchTest, APinOfAllOfALargeMemoryIsOneRunAndOneCall) {
  GuestRam large(uint64_t{64} << 30);  // sparse
  Start({}, MakeNonePinBackend());
  ASSERT_THAT(container_.map(large.map_request(0, 0, large.size())), IsOk());
  auto all = Pin(0, large.size());
  ASSERT_THAT(all, IsOk());
  EXPECT_EQ(all->runs().size(), 1u);
  EXPECT_EQ(domain_->counters().unique_pages, PagesIn(large.size()));
  PinnedRange middle = all->split_off(Iova(uint64_t{32} << 30));
  middle.split_off(Iova(uint64_t{48} << 30)).reset();
  EXPECT_EQ(domain_->counters().unique_pages, PagesIn(uint64_t{48} << 30));
}

TEST_F(PinBatchTest, AContextThatStillHoldsMayNotGo) {
  Map(0, 0, BytesIn(4));
  ASSERT_THAT(PinPages(PagesAt({1})), IsOk());
  EXPECT_DEATH(context_.reset(), "check failed");
  ASSERT_THAT(Unpin(PagesAt({1})), IsOk());
}

}  // namespace
}  // namespace mvgpu::domain
