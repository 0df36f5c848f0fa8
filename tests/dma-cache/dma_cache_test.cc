#include "dma-cache/dma_cache.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <optional>
#include <thread>

#include "tests/fakes/counting_mapper.h"
#include "tests/fakes/fake_pin_backend.h"
#include "tests/fakes/guest_ram.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::dma {
namespace {

using testing::CountingMapper;
using testing::FailsWith;
using testing::FakePinBackend;
using testing::GuestRam;
using testing::IsOk;
using testing::MakeRange;

class DmaCacheTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto domain = domain::ApiOnlyDomain::Create({}, std::make_unique<FakePinBackend>(pins_),
                                                nullptr, nullptr);
    ASSERT_THAT(domain, IsOk());
    domain_ = std::move(*domain);
    ASSERT_THAT(container_.attach(domain_.get()), IsOk());
    ASSERT_THAT(MapRam(0, 0, 128), IsOk());
    cache_.emplace(domain_.get(), &mapper_);
  }
  void TearDown() override {
    cache_.reset();
    EXPECT_EQ(mapper_.mapped_pages(), 0u);
    EXPECT_TRUE(pins_->pages.empty());
    ASSERT_THAT(container_.detach(domain_.get()), IsOk());
  }

  Result<void> MapRam(uint64_t iova_page, uint64_t file_page, uint64_t pages,
                      domain::Access access = domain::Access::kReadWrite) {
    return container_.map(
        ram_.map_request(BytesIn(iova_page), BytesIn(file_page), BytesIn(pages), access));
  }
  Result<DmaMapping> Use(uint64_t page, uint64_t count,
                         Direction direction = Direction::kToDevice) {
    return cache_->map(MakeRange(BytesIn(page), BytesIn(count)), direction);
  }
  uint64_t UniquePins() const { return domain_->counters().unique_pages; }

  GuestRam ram_{256 * kPageSize};
  std::shared_ptr<FakePinBackend::State> pins_ = std::make_shared<FakePinBackend::State>();
  domain::Container container_;
  std::unique_ptr<domain::ApiOnlyDomain> domain_;
  CountingMapper mapper_;
  std::optional<DmaCache> cache_;
};

TEST_F(DmaCacheTest, APageIsMappedOnceHoweverOftenItIsAskedFor) {
  auto a = Use(0, 8);
  auto b = Use(4, 8);
  auto c = Use(0, 12);
  ASSERT_THAT(c, IsOk());
  for (const auto& [page, times] : mapper_.maps_of_page) EXPECT_EQ(times, 1u) << page;
  const DmaCache::Counters counters = cache_->counters();
  EXPECT_EQ(counters.miss_pages, 12u);
  EXPECT_EQ(counters.hit_pages, 4u + 12u);
  EXPECT_EQ(counters.cached_pages, 12u);
  EXPECT_EQ(UniquePins(), 12u);
}

TEST_F(DmaCacheTest, TheAddressOfEachPageIsWhatTheMapperGaveForIt) {
  ASSERT_THAT(container_.map(ram_.map_request(0x1000000, 0x90000, 0x2000)), IsOk());
  ASSERT_THAT(container_.map(ram_.map_request(0x1002000, 0xa0000, 0x2000)), IsOk());
  auto use = cache_->map(MakeRange(0x1000000, 0x4000), Direction::kToDevice);
  ASSERT_THAT(use, IsOk());
  ASSERT_EQ(use->runs().size(), 2u);  // two runs of backing
  for (const DmaRun& run : use->runs()) {
    for (uint64_t i = 0; i < PagesIn(run.iova.size()); ++i) {
      EXPECT_EQ(mapper_.iova_page_at(run.address + BytesIn(i)), run.iova.start().page() + i);
    }
  }
}

TEST_F(DmaCacheTest, TheLastUserUnmapsAndUnpins) {
  auto a = Use(0, 8);
  auto b = Use(4, 8);
  a->reset();
  EXPECT_EQ(mapper_.mapped_pages(), 8u);
  EXPECT_EQ(UniquePins(), 8u);
  b->reset();
  EXPECT_EQ(mapper_.mapped_pages(), 0u);
  EXPECT_EQ(UniquePins(), 0u);
  EXPECT_EQ(cache_->counters().unmapped_pages, 12u);
}

TEST_F(DmaCacheTest, ShortUsesOfALongMappingCutNothing) {
  auto all = Use(0, 64);
  for (uint64_t page = 0; page < 64; ++page) ASSERT_THAT(Use(page, 1), IsOk());
  EXPECT_EQ(cache_->counters().entries, 1u);
  EXPECT_EQ(cache_->counters().hit_pages, 64u);
  EXPECT_EQ(mapper_.map_calls, 1u);
}

TEST_F(DmaCacheTest, UnalignedRangesMapWholePages) {
  auto use = cache_->map(MakeRange(0x1fff, 2), Direction::kToDevice);
  ASSERT_THAT(use, IsOk());
  EXPECT_EQ(cache_->counters().cached_pages, 2u);
}

TEST_F(DmaCacheTest, ReadsGuestBytesAcrossRuns) {
  ram_.fill_pattern();
  ASSERT_THAT(MapRam(200, 10, 1), IsOk());
  ASSERT_THAT(MapRam(201, 3, 1), IsOk());
  auto use = Use(200, 2);
  ASSERT_THAT(use, IsOk());
  std::vector<std::byte> copy(0x100);
  ASSERT_THAT(use->read(Iova(BytesIn(201) - 0x80), copy), IsOk());
  EXPECT_EQ(std::memcmp(copy.data(), ram_.at(BytesIn(11) - 0x80), 0x80), 0);
  EXPECT_EQ(std::memcmp(copy.data() + 0x80, ram_.at(BytesIn(3)), 0x80), 0);
  EXPECT_THAT(use->read(Iova(BytesIn(202) - 0x80), copy), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(use->read(Iova(BytesIn(200) - 1), copy), FailsWith(ErrorCode::kInvalid));
}

TEST_F(DmaCacheTest, AMapperFailureAtAnyStepRollsBack) {
  for (uint64_t i = 0; i < 4; ++i) ASSERT_THAT(MapRam(200 + i, 2 * i, 1), IsOk());  // 4 runs
  auto held = Use(201, 1);
  for (uint64_t n = 1; n <= 3; ++n) {
    mapper_.fail_at_call = n;
    EXPECT_THAT(Use(200, 4), FailsWith(ErrorCode::kLimit));
    EXPECT_EQ(cache_->counters().cached_pages, 1u);
    EXPECT_EQ(UniquePins(), 1u);
  }
  EXPECT_TRUE(held->is_valid());
  EXPECT_THAT(Use(200, 4), IsOk());
}

TEST_F(DmaCacheTest, APinFailureInALaterGapRollsBackTheEarlierOnes) {
  auto held = Use(4, 1);
  pins_->fail_at_call = 2;  // gaps 0-3 and 5-7
  EXPECT_THAT(Use(0, 8), FailsWith(ErrorCode::kLimit));
  EXPECT_EQ(cache_->counters().cached_pages, 1u);
  EXPECT_EQ(UniquePins(), 1u);
}

TEST_F(DmaCacheTest, AHitNeedsThePermissionTheNewUseWants) {
  ASSERT_THAT(MapRam(200, 0, 1, domain::Access::kRead), IsOk());
  auto reader = Use(200, 1, Direction::kToDevice);
  ASSERT_THAT(reader, IsOk());
  EXPECT_THAT(Use(200, 1, Direction::kFromDevice), FailsWith(ErrorCode::kPermission));
  EXPECT_EQ(cache_->counters().hit_pages, 0u);
}

TEST_F(DmaCacheTest, AnUnmapRevokesInTheOrderDeviceThenPin) {
  ASSERT_THAT(MapRam(200, 0, 4), IsOk());
  auto use = Use(200, 4);
  mapper_.on_unmap = [this] {
    EXPECT_EQ(UniquePins(), 4u);
  };  // still pinned while the device lets go
  ASSERT_THAT(container_.unmap(Iova(BytesIn(200)), BytesIn(4)), IsOk());
  mapper_.on_unmap = nullptr;
  EXPECT_FALSE(use->is_valid());
  std::vector<std::byte> copy(16);
  EXPECT_THAT(use->read(Iova(BytesIn(200)), copy), FailsWith(ErrorCode::kRevoked));
  EXPECT_EQ(UniquePins(), 0u);
  EXPECT_EQ(cache_->counters().revoked_pages, 4u);
}

// kvmgt's holders of a revoked entry found a later one and released that (lesson 21).
TEST_F(DmaCacheTest, ARevokedUseDoesNotReleaseWhatWasMappedAfterIt) {
  ASSERT_THAT(MapRam(200, 0, 4), IsOk());
  auto old_use = Use(200, 4);
  ASSERT_THAT(container_.unmap(Iova(BytesIn(200)), BytesIn(4)), IsOk());
  ASSERT_THAT(MapRam(200, 8, 4), IsOk());
  auto new_use = Use(200, 4);
  old_use->reset();
  EXPECT_TRUE(new_use->is_valid());
  EXPECT_EQ(mapper_.mapped_pages(), 4u);
}

TEST_F(DmaCacheTest, ARevocationOfAPartLeavesTheRestToBeReleasedOnce) {
  ASSERT_THAT(MapRam(200, 0, 4), IsOk());
  ASSERT_THAT(MapRam(204, 4, 4), IsOk());  // one run of backing with the one before
  auto use = Use(200, 8);
  EXPECT_EQ(cache_->counters().entries, 1u);
  ASSERT_THAT(container_.unmap(Iova(BytesIn(200)), BytesIn(4)), IsOk());
  EXPECT_FALSE(use->is_valid());
  EXPECT_EQ(UniquePins(), 4u);
  use->reset();
  EXPECT_EQ(UniquePins(), 0u);
  EXPECT_EQ(mapper_.mapped_pages(), 0u);
}

TEST_F(DmaCacheTest, TheNoneMapperGivesTheHostPointer) {
  auto mapper = MakeNoneMapper();
  DmaCache cache(domain_.get(), mapper.get());
  auto use = cache.map(MakeRange(BytesIn(3), BytesIn(2)), Direction::kToDevice);
  ASSERT_THAT(use, IsOk());
  ram_.fill_pattern();
  const auto* host = reinterpret_cast<const std::byte*>(use->runs()[0].address.value());
  EXPECT_EQ(std::memcmp(host, ram_.at(BytesIn(3)), BytesIn(2)), 0);
}

TEST_F(DmaCacheTest, ThreadsUseWhileAnotherRevokes) {
  ASSERT_THAT(MapRam(200, 0, 32), IsOk());
  std::vector<std::thread> threads;
  for (uint64_t t = 0; t < 3; ++t) {
    threads.emplace_back([this, t] {
      std::array<std::byte, 256> bytes;
      for (uint64_t i = 0; i < 2000; ++i) {
        auto use = Use((t * 5 + i) % 100, 10);
        ASSERT_THAT(use, IsOk());
        ASSERT_THAT(use->read(Iova(BytesIn((t * 5 + i) % 100)), bytes), IsOk());
        auto risky = Use(200 + (t + i) % 24, 8);  // may fail while the range is unmapped
        if (risky) static_cast<void>(risky->read(Iova(BytesIn(200 + (t + i) % 24)), bytes));
      }
    });
  }
  threads.emplace_back([this] {
    for (int i = 0; i < 500; ++i) {
      ASSERT_THAT(container_.unmap(Iova(BytesIn(200)), BytesIn(32)), IsOk());
      ASSERT_THAT(MapRam(200, 0, 32), IsOk());
    }
  });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(cache_->counters().cached_pages, 0u);
  const DmaCache::Counters counters = cache_->counters();
  EXPECT_EQ(counters.miss_pages, counters.unmapped_pages);
}

}  // namespace
}  // namespace mvgpu::dma
