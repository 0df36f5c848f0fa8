#include "apionly-domain/dirty_log.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <set>
#include <thread>
#include <vector>

#include "tests/fakes/guest_ram.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::domain {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using testing::FailsWith;
using ::testing::IsEmpty;
using testing::IsOk;
using testing::MakeRange;

class DirtyLogTest : public ::testing::Test {
 protected:
  DirtyLogTest() { log_.start(); }
  // The bits that are set, by number.
  std::vector<uint64_t> Read(IovaRange range, uint64_t bit_size,
                             DirtyLog::Read read = DirtyLog::Read::kKeep) {
    std::vector<uint64_t> bitmap(range.size() / bit_size / 64 + 1);
    EXPECT_THAT(DirtyLog::CheckBitmap(range, bit_size, bitmap), IsOk());
    log_.read(range, bit_size, read, bitmap);
    std::vector<uint64_t> set;
    for (uint64_t bit = 0; bit < bitmap.size() * 64; ++bit) {
      if ((bitmap[bit / 64] >> bit % 64 & 1) != 0) set.push_back(bit);
    }
    return set;
  }

  DirtyLog log_;
};

// libvfio-user's conversion hangs or drops bits from 256 on (lesson 30): here every count of pages
// around that, for every size of a bit from 4 KiB to 1 MiB, against a set of pages.
TEST_F(DirtyLogTest, EveryBitSizeAgreesWithASetOfPagesAtEveryCount) {
  std::mt19937_64 random(7);
  for (const uint64_t bits : {1u, 63u, 64u, 65u, 255u, 256u, 257u, 1000000u}) {
    for (uint64_t bit_size = kPageSize; bit_size <= 1 << 20; bit_size *= 2) {
      SCOPED_TRACE(bits);
      SCOPED_TRACE(bit_size);
      const IovaRange range = MakeRange(uint64_t{3} << 20, bits * bit_size);
      const PageRun pages = PagesOf(range);
      log_.start();
      std::set<uint64_t> expected;
      const auto mark = [&](uint64_t page) {
        log_.mark({page, 1});
        if (pages.contains(page)) expected.insert((page - pages.first) / PagesIn(bit_size));
      };
      mark(pages.first);
      mark(pages.end() - 1);
      mark(pages.first - 1);  // outside
      mark(pages.end());
      for (int i = 0; i < 200; ++i) mark(pages.first + random() % pages.count);
      EXPECT_EQ(Read(range, bit_size), std::vector(expected.begin(), expected.end()));
    }
  }
}

TEST_F(DirtyLogTest, ARunMarksAllItsPagesAcrossPieces) {
  log_.mark({32000, 3000});  // a piece ends at 32768
  std::vector<uint64_t> expected(3000);
  for (uint64_t i = 0; i < 3000; ++i) expected[i] = i + 10;
  EXPECT_EQ(Read(MakeRange(BytesIn(31990), BytesIn(4000)), kPageSize), expected);
}

TEST_F(DirtyLogTest, AReadMayKeepOrClearAndClearsItsRangeOnly) {
  log_.mark({10, 4});
  const IovaRange all = MakeRange(0, BytesIn(64));
  EXPECT_THAT(Read(all, kPageSize, DirtyLog::Read::kKeep), ElementsAre(10, 11, 12, 13));
  EXPECT_THAT(Read(MakeRange(BytesIn(11), BytesIn(2)), kPageSize, DirtyLog::Read::kClear),
              ElementsAre(0, 1));
  EXPECT_THAT(Read(all, kPageSize, DirtyLog::Read::kClear), ElementsAre(10, 13));
  EXPECT_THAT(Read(all, kPageSize), IsEmpty());
}

TEST_F(DirtyLogTest, OtherBitsOfTheBitmapStayAsTheyAre) {
  log_.mark({3, 1});
  std::vector<uint64_t> bitmap = {uint64_t{1} << 63, ~uint64_t{0}};
  log_.read(MakeRange(0, BytesIn(8)), kPageSize, DirtyLog::Read::kKeep, bitmap);
  EXPECT_THAT(bitmap, ElementsAre(uint64_t{1} << 63 | 8, ~uint64_t{0}));
}

TEST_F(DirtyLogTest, StartingAndStoppingForget) {
  log_.mark({1, 1});
  log_.start();
  EXPECT_THAT(Read(MakeRange(0, BytesIn(64)), kPageSize), IsEmpty());
  log_.mark({1, 1});
  log_.stop();
  EXPECT_FALSE(log_.is_on());
  log_.mark({2, 1});
  log_.start();
  EXPECT_THAT(Read(MakeRange(0, BytesIn(64)), kPageSize), IsEmpty());
}

TEST_F(DirtyLogTest, TheEndOfTheAddressSpaceIsLoggedToo) {
  log_.mark({UINT64_MAX >> kPageShift, 1});
  EXPECT_THAT(Read(MakeRange(UINT64_MAX - 0xffff, 0x10000), kPageSize), ElementsAre(15));
  EXPECT_THAT(Read(MakeRange(UINT64_MAX - 0xffff, 0x10000), 0x10000), ElementsAre(0));
}

TEST_F(DirtyLogTest, BitmapsThatMakeNoSenseAreRefused) {
  std::vector<uint64_t> bitmap(4);  // 256 bits
  const auto check = [&](uint64_t start, uint64_t size, uint64_t bit_size) {
    return DirtyLog::CheckBitmap(MakeRange(start, size), bit_size, bitmap);
  };
  EXPECT_THAT(check(0, BytesIn(256), kPageSize), IsOk());
  EXPECT_THAT(check(0, BytesIn(257), kPageSize), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(check(0, BytesIn(257) * 2, 2 * kPageSize), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(check(0, BytesIn(8), 2048), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(check(0, BytesIn(9), 3 * kPageSize), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(check(0, BytesIn(8), 0), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(check(kPageSize, BytesIn(8), 2 * kPageSize), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(check(0, BytesIn(9), 2 * kPageSize), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(check(0, kPageSize + 1, kPageSize), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(DirtyLog::CheckBitmap(IovaRange::FromFirstAndLast(Iova(0), Iova(UINT64_MAX)),
                                    kPageSize, bitmap),
              FailsWith(ErrorCode::kInvalid));
}

TEST_F(DirtyLogTest, NoMarkIsLostBetweenThreadsThatMarkAndOneThatClears) {
  constexpr uint64_t kPages = 4096;
  std::vector<std::thread> markers;
  for (uint64_t t = 0; t < 2; ++t) {
    markers.emplace_back([this, t] {
      for (uint64_t page = t; page < kPages; page += 2) log_.mark({page, 1});
    });
  }
  const IovaRange range = MakeRange(0, BytesIn(kPages));
  std::vector<int> seen(kPages);
  const auto take = [&] {
    for (const uint64_t page : Read(range, kPageSize, DirtyLog::Read::kClear)) ++seen[page];
  };
  for (int i = 0; i < 20; ++i) take();
  for (std::thread& marker : markers) marker.join();
  take();
  EXPECT_THAT(seen, Each(1));
}

}  // namespace
}  // namespace mvgpu::domain
