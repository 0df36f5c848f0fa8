// Words that guest and host change under each other's eyes.

#include <unistd.h>

#include <array>
#include <atomic>
#include <thread>

#include "tests/apionly-domain/domain_fixture.h"
#include "tests/fakes/fake_remote_memory.h"

namespace mvgpu::domain {
namespace {

using testing::FailsWith;
using testing::IsOk;
using testing::IsOkAndHolds;

class WordAccessTest : public DomainTest {
 protected:
  static constexpr uint64_t kRemote = 0x100'0000;

  Result<uint64_t> Load(uint64_t iova) {
    uint64_t word = 0;
    auto loaded = domain_->load_words(Iova(iova), std::span(&word, 1));
    if (!loaded) return tl::unexpected<Error>(loaded.error());
    return word;
  }
  Result<uint64_t> Exchange(uint64_t iova, uint64_t expected, uint64_t desired) {
    return domain_->compare_exchange(Iova(iova), expected, desired);
  }
};

TEST_F(WordAccessTest, WordsAreLoaded) {
  Map(0x4000, 0, kPageSize);
  std::array<uint64_t, 512> words;
  for (uint64_t i = 0; i < words.size(); ++i) ram_.put(i * 8, i * 0x0101'0101'0101);
  ASSERT_THAT(domain_->load_words(Iova(0x4000), words), IsOk());
  for (uint64_t i = 0; i < words.size(); ++i) EXPECT_EQ(words[i], i * 0x0101'0101'0101);
}

TEST_F(WordAccessTest, AnExchangeStoresOnlyOverWhatWasExpected) {
  Map(0x4000, 0, kPageSize);
  ram_.put<uint64_t>(16, 5);
  EXPECT_THAT(Exchange(0x4010, 4, 9), IsOkAndHolds(5u));
  EXPECT_EQ(ram_.get<uint64_t>(16), 5);
  EXPECT_THAT(Exchange(0x4010, 5, 9), IsOkAndHolds(5u));
  EXPECT_EQ(ram_.get<uint64_t>(16), 9);
}

TEST_F(WordAccessTest, OnlyAnExchangeThatStoredMakesThePageDirty) {
  Map(0x4000, 0, kPageSize);
  domain_->start_dirty_log();
  const auto is_dirty = [&] {
    std::array<uint64_t, 1> bitmap = {};
    EXPECT_THAT(domain_->read_dirty(testing::MakeRange(0x4000, kPageSize), kPageSize,
                                    DirtyLog::Read::kClear, bitmap),
                IsOk());
    return bitmap[0] != 0;
  };
  EXPECT_THAT(Exchange(0x4000, 1, 2), IsOkAndHolds(0u));
  EXPECT_FALSE(is_dirty());
  EXPECT_THAT(Exchange(0x4000, 0, 2), IsOkAndHolds(0u));
  EXPECT_TRUE(is_dirty());
}

TEST_F(WordAccessTest, RightsAndHolesAreErrors) {
  Map(0x4000, 0, kPageSize, Access::kRead);
  Map(0x5000, kPageSize, kPageSize, Access::kWrite);
  EXPECT_THAT(Load(0x4000), IsOk());
  EXPECT_THAT(Exchange(0x4000, 0, 1), FailsWith(ErrorCode::kPermission));
  EXPECT_THAT(Load(0x5000), FailsWith(ErrorCode::kPermission));
  EXPECT_THAT(Exchange(0x5000, 0, 1), FailsWith(ErrorCode::kPermission));
  EXPECT_THAT(Load(0x6000), FailsWith(ErrorCode::kNotMapped));
  EXPECT_THAT(Exchange(0x6000, 0, 1), FailsWith(ErrorCode::kNotMapped));
}

TEST_F(WordAccessTest, MemoryWithoutAFileIsLoadedThroughTheVmmAndNotExchanged) {
  testing::FakeRemoteMemory remote(Iova(kRemote), kPageSize);
  Start({.remote = &remote});
  MapWithoutFile(kRemote, kPageSize);
  remote.bytes()[8] = std::byte{0x42};
  EXPECT_THAT(Load(kRemote + 8), IsOkAndHolds(0x42u));
  EXPECT_THAT(Exchange(kRemote + 8, 0x42, 1), FailsWith(ErrorCode::kNotReachable));
  EXPECT_THAT(container_.unmap_all(), IsOk());
  Stop();
}

TEST_F(WordAccessTest, ATruncatedFileIsAnErrorOfThisGuestOnly) {
  testing::GuestRam unsealed(BytesIn(2), /*seals=*/0);
  ASSERT_THAT(container_.map(unsealed.map_request(0x10'0000, 0, BytesIn(2))), IsOk());
  ASSERT_EQ(ftruncate(unsealed.fd(), kPageSize), 0);
  for (int again = 0; again < 2; ++again) {
    EXPECT_THAT(Load(0x10'1000), FailsWith(ErrorCode::kTruncated));
    EXPECT_THAT(Exchange(0x10'1000, 0, 1), FailsWith(ErrorCode::kTruncated));
  }
  EXPECT_THAT(Exchange(0x10'0000, 0, 1), IsOk());
}

// A file that is cut between two loads, again and again: each load answers for itself, in whatever
// word of the page it began, and what was loaded of memory that is there is right.
TEST_F(WordAccessTest, LoadsGoOnAfterOnesThatMetATruncatedFile) {
  testing::GuestRam unsealed(BytesIn(2), /*seals=*/0);
  ASSERT_THAT(container_.map(unsealed.map_request(0x10'0000, 0, BytesIn(2))), IsOk());
  unsealed.put<uint64_t>(kPageSize - 8, 7);
  for (int again = 0; again < 3; ++again) {
    ASSERT_EQ(ftruncate(unsealed.fd(), kPageSize), 0);
    std::array<uint64_t, 512> words;
    EXPECT_THAT(domain_->load_words(Iova(0x10'1000), words), FailsWith(ErrorCode::kTruncated));
    EXPECT_THAT(Load(0x10'1ff8), FailsWith(ErrorCode::kTruncated));
    EXPECT_THAT(Load(0x10'0ff8), IsOkAndHolds(7u));
    ASSERT_EQ(ftruncate(unsealed.fd(), BytesIn(2)), 0);
    EXPECT_THAT(Load(0x10'1000), IsOkAndHolds(0u));
  }
}

TEST_F(WordAccessTest, ALoadOfNoWordsIsInvalid) {
  Map(0x4000, 0, kPageSize);
  EXPECT_THAT(domain_->load_words(Iova(0x4000), {}), FailsWith(ErrorCode::kInvalid));
}

// The guest counts in the same word.
TEST_F(WordAccessTest, ExchangesAreAtomicTowardsTheGuest) {
  constexpr uint64_t kRounds = 20000;
  Map(0x4000, 0, kPageSize);
  std::thread guest([&] {
    std::atomic_ref<uint64_t> word(*reinterpret_cast<uint64_t*>(ram_.at(0)));
    for (uint64_t i = 0; i < kRounds; ++i) word.fetch_add(1, std::memory_order_relaxed);
  });
  uint64_t expected = 0;
  for (uint64_t added = 0; added < kRounds;) {
    const auto found = Exchange(0x4000, expected, expected + 1);
    ASSERT_THAT(found, IsOk());
    added += *found == expected ? 1 : 0;
    expected = *found == expected ? expected + 1 : *found;
  }
  guest.join();
  EXPECT_EQ(ram_.get<uint64_t>(0), 2 * kRounds);
}

}  // namespace
}  // namespace mvgpu::domain
