#include "apionly-domain/assigned/iova_allocator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <cstdlib>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "tests/fakes/guest_ram.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::domain {
namespace {

using testing::FailsWith;
using testing::IsOk;
using testing::IsOkAndHolds;
using testing::MakeRange;

constexpr uint64_t kMiB = 1 << 20;
constexpr uint64_t kGiB = 1 << 30;
constexpr uint64_t kAllSizes = 1ull << 12 | 1ull << 21 | 1ull << 30;

std::vector<IovaRange> X86Ranges() {
  return {MakeRange(0, 0xfee00000), MakeRange(0xfef00000, (1ull << 39) - 0xfef00000)};
}
const std::byte* Host(uint64_t address) { return std::bit_cast<const std::byte*>(address); }

TEST(IovaAllocatorTest, TheFirstPagesAreTheHighestBelow4GiBAsTheKernelsAre) {
  IovaAllocator allocator(X86Ranges(), kAllSizes);
  EXPECT_THAT(allocator.allocate(kPageSize, Host(0)), IsOkAndHolds(MakeRange(0xfffff000, 0x1000)));
  EXPECT_THAT(allocator.allocate(0x3000, Host(0)), IsOkAndHolds(MakeRange(0xffffc000, 0x3000)));
}

TEST(IovaAllocatorTest, ReservedAddressesAreSkipped) {
  IovaAllocator allocator(X86Ranges(), kAllSizes);
  // 0xfef00000-0xffffffff holds 17 MiB: the second one comes to lie below the interrupt window.
  ASSERT_THAT(allocator.allocate(16 * kMiB, Host(0)), IsOk());
  EXPECT_THAT(allocator.allocate(16 * kMiB, Host(0)),
              IsOkAndHolds(MakeRange(0xfde00000, 16 * kMiB)));
}

TEST(IovaAllocatorTest, WithoutAWishForLowAddressesItBeginsAtTheTop) {
  IovaAllocator allocator(X86Ranges(), kAllSizes, Iova(0));
  EXPECT_THAT(allocator.allocate(kPageSize, Host(0)),
              IsOkAndHolds(MakeRange((1ull << 39) - 0x1000, 0x1000)));
}

TEST(IovaAllocatorTest, WhatDoesNotFitBelow4GiBGoesAbove) {
  IovaAllocator allocator(X86Ranges(), kAllSizes);
  const auto range = allocator.allocate(8 * kGiB, Host(0));
  ASSERT_THAT(range, IsOk());
  EXPECT_GE(range->start().value(), 4 * kGiB);
}

TEST(IovaAllocatorTest, LargeRangesLieAsTheirHostMemoryDoes) {
  IovaAllocator allocator(X86Ranges(), kAllSizes);
  ASSERT_THAT(allocator.allocate(kPageSize, Host(0)), IsOk());
  const auto two = allocator.allocate(2 * kMiB, Host(0x7f1234567000));
  ASSERT_THAT(two, IsOk());
  EXPECT_EQ(two->start().value() % (2 * kMiB), 0x7f1234567000u % (2 * kMiB));
  const auto huge = allocator.allocate(kGiB + kPageSize, Host(0x7f1234567000));
  ASSERT_THAT(huge, IsOk());
  EXPECT_EQ(huge->start().value() % kGiB, 0x7f1234567000u % kGiB);
}

TEST(IovaAllocatorTest, PagesThatTheIommuDoesNotHaveAreNoReasonToAlign) {
  IovaAllocator allocator(X86Ranges(), 1ull << 12);
  EXPECT_THAT(allocator.allocate(2 * kMiB, Host(0x5000)),
              IsOkAndHolds(MakeRange(0x100000000 - 2 * kMiB, 2 * kMiB)));
}

TEST(IovaAllocatorTest, WhereNoPlaceIsCongruentAnyPlaceWillDo) {
  IovaAllocator allocator(std::vector{MakeRange(0x1000, 2 * kMiB)}, kAllSizes);
  EXPECT_THAT(allocator.allocate(2 * kMiB, Host(0)), IsOkAndHolds(MakeRange(0x1000, 2 * kMiB)));
}

TEST(IovaAllocatorTest, AFreedRangeIsNotHandedOutAgainAtOnce) {
  IovaAllocator allocator(std::vector{MakeRange(0x10000, 0x10000)}, kAllSizes);
  std::set<uint64_t> seen;
  for (int i = 0; i < 16; ++i) {  // 16 pages: each one comes once before any comes again
    const auto page = allocator.allocate(kPageSize, Host(0));
    ASSERT_THAT(page, IsOk());
    EXPECT_TRUE(seen.insert(page->start().value()).second) << i;
    allocator.free(*page);
  }
  EXPECT_THAT(allocator.allocate(kPageSize, Host(0)), IsOkAndHolds(MakeRange(0x1f000, 0x1000)));
}

TEST(IovaAllocatorTest, PageZeroIsReservedButNeverHandedOut) {
  IovaAllocator allocator(std::vector{MakeRange(0, 0x2000)}, kAllSizes);
  EXPECT_THAT(allocator.allocate(0x2000, Host(0)), FailsWith(ErrorCode::kLimit));
  EXPECT_THAT(allocator.allocate(0x1000, Host(0)), IsOkAndHolds(MakeRange(0x1000, 0x1000)));
  EXPECT_THAT(allocator.allocate(0x1000, Host(0)), FailsWith(ErrorCode::kLimit));
  EXPECT_THAT(allocator.reserve(MakeRange(0, 0x1000)), IsOk());
}

TEST(IovaAllocatorTest, ReservedRangesAreNotHandedOutAndNotReservedTwice) {
  IovaAllocator allocator(X86Ranges(), kAllSizes);
  ASSERT_THAT(allocator.reserve(MakeRange(0xfffff000, 0x2000)), IsOk());
  EXPECT_THAT(allocator.reserve(MakeRange(0x100000000, 0x1000)), FailsWith(ErrorCode::kOverlap));
  EXPECT_THAT(allocator.reserve(MakeRange(0xfee00000, 0x1000)),
              FailsWith(ErrorCode::kNotReachable));
  EXPECT_THAT(allocator.reserve(MakeRange(0xfedff000, 0x2000)),
              FailsWith(ErrorCode::kNotReachable));
  EXPECT_THAT(allocator.allocate(kPageSize, Host(0)), IsOkAndHolds(MakeRange(0xffffe000, 0x1000)));
}

TEST(IovaAllocatorTest, FullSaysHowMuchIsFree) {
  IovaAllocator allocator(std::vector{MakeRange(0x10000, 0x4000)}, kAllSizes);
  ASSERT_THAT(allocator.reserve(MakeRange(0x12000, 0x1000)), IsOk());
  const auto range = allocator.allocate(0x3000, Host(0));
  ASSERT_THAT(range, FailsWith(ErrorCode::kLimit));
  EXPECT_THAT(range.error().message(), ::testing::HasSubstr("12288 bytes"));
  EXPECT_THAT(range.error().message(), ::testing::HasSubstr("12288 bytes are free, at most 8192"));
}

TEST(IovaAllocatorTest, TheLastPageOf64BitsCanBeHandedOut) {
  IovaAllocator allocator(std::vector{IovaRange::FromFirstAndLast(Iova(0), Iova(UINT64_MAX))},
                          kAllSizes, Iova(0));
  EXPECT_THAT(allocator.allocate(kPageSize, Host(0)),
              IsOkAndHolds(MakeRange(UINT64_MAX - 0xfff, 0x1000)));
}

// Against a set of pages: what is handed out was free and usable, an allocation fails only where
// no place is left, and a free page stays unused as long as there is another place below the last.
class IovaAllocatorModelTest : public ::testing::TestWithParam<uint32_t> {
 protected:
  static constexpr uint64_t kFirst = 3;
  static constexpr uint64_t kEnd = 400;
  static bool IsUsable(uint64_t page) { return page >= kFirst && page < kEnd && page / 8 != 11; }

  void Allocate(uint64_t pages) {
    const auto range = allocator_.allocate(BytesIn(pages), Host(0));
    ASSERT_EQ(range.has_value(), HasPlace(pages));
    if (!range) return;
    const PageRun run = PagesOf(*range);
    ASSERT_EQ(run.count, pages);
    for (uint64_t page = run.first; page < run.end(); ++page) {
      ASSERT_TRUE(IsUsable(page));
      ASSERT_TRUE(used_.insert(page).second) << page << " was in use";
    }
    held_.push_back(run);
  }
  bool HasPlace(uint64_t pages) const {
    uint64_t length = 0;
    for (uint64_t page = 0; page < kEnd; ++page) {
      length = IsUsable(page) && !used_.contains(page) ? length + 1 : 0;
      if (length == pages) return true;
    }
    return false;
  }
  void FreeAPartOf(size_t index, uint64_t head, uint64_t count) {
    const PageRun run = held_[index];
    held_.erase(held_.begin() + static_cast<ptrdiff_t>(index));
    const PageRun part{run.first + head, count};
    allocator_.free(RangeOf(part));
    for (uint64_t page = part.first; page < part.end(); ++page) used_.erase(page);
    if (head != 0) held_.push_back({run.first, head});
    if (part.end() < run.end()) held_.push_back({part.end(), run.end() - part.end()});
  }

  std::vector<IovaRange> usable_ = {RangeOf({kFirst, 88 - kFirst}), RangeOf({96, kEnd - 96})};
  IovaAllocator allocator_{usable_, kAllSizes};
  std::set<uint64_t> used_;
  std::vector<PageRun> held_;
};

TEST_P(IovaAllocatorModelTest, AgreesWithASetOfPages) {
  std::mt19937 random(GetParam());
  const auto below = [&](uint64_t end) { return random() % end; };
  for (int step = 0; step < 1500 && !HasFatalFailure(); ++step) {
    if (below(5) < 3 || held_.empty()) {
      Allocate(1 + below(12));
    } else if (below(4) == 0) {
      const uint64_t page = below(kEnd + 8);
      const bool is_free = IsUsable(page) && !used_.contains(page);
      ASSERT_EQ(allocator_.reserve(RangeOf({page, 1})).has_value(), is_free) << page;
      if (is_free) {
        used_.insert(page);
        held_.push_back({page, 1});
      }
    } else {
      const size_t index = below(held_.size());
      const uint64_t head = below(held_[index].count);
      FreeAPartOf(index, head, 1 + below(held_[index].count - head));
    }
    uint64_t usable = 0;
    for (uint64_t page = 0; page < kEnd; ++page) usable += IsUsable(page) ? 1 : 0;
    ASSERT_EQ(allocator_.free_pages(), usable - used_.size());
  }
  while (!held_.empty()) FreeAPartOf(0, 0, held_[0].count);
  EXPECT_THAT(allocator_.allocate(BytesIn(kEnd - 96), Host(0)), IsOk());  // all came together again
}

INSTANTIATE_TEST_SUITE_P(Seeds, IovaAllocatorModelTest, ::testing::Range(1u, 9u));

}  // namespace
}  // namespace mvgpu::domain
