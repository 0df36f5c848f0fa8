// Pages that nobody holds and that stay.

#include "tests/dma-cache/dma_cache_fixture.h"

namespace mvgpu::dma {
namespace {

using namespace testing;

class DmaIdleTest : public DmaCacheFixture {
 protected:
  DmaIdleTest() : DmaCacheFixture(/*idle_limit_pages=*/16, /*pin_limit_pages=*/24) {}
  bool IsCached(uint64_t page) { return cache_->address_of(Iova(BytesIn(page))).has_value(); }
};

TEST_F(DmaIdleTest, AnIdlePageStaysMappedAndIsAHit) {
  Use(0, 8)->reset();
  EXPECT_EQ(Now().idle_pages, 8u);
  EXPECT_EQ(Now().idle_bytes(), 8 * kPageSize);
  EXPECT_EQ(Now().cached_pages, 8u);
  EXPECT_EQ(UniquePins(), 8u);
  auto again = Use(2, 4);
  EXPECT_EQ(Now().hit_pages, 4u);
  EXPECT_EQ(Now().idle_pages, 4u);
  EXPECT_EQ(mapper_.map_calls, 1u);
  auto loose = UsePages({0, 7});
  ASSERT_THAT(loose, IsOk());
  EXPECT_EQ(Now().idle_pages, 2u);
  EXPECT_THAT(Release(*loose), IsOk());
  EXPECT_EQ(Now().idle_pages, 4u);
}

TEST_F(DmaIdleTest, TheOldestGoWhenThereAreTooMany) {
  Use(0, 8)->reset();
  Use(20, 8)->reset();
  Use(0, 1)->reset();  // now younger than the others
  Use(40, 4)->reset();
  EXPECT_EQ(Now().idle_pages, 16u);
  EXPECT_EQ(Now().evicted_pages, 4u);
  EXPECT_TRUE(IsCached(0));
  for (uint64_t page = 1; page <= 4; ++page) EXPECT_FALSE(IsCached(page)) << page;
  for (uint64_t page = 5; page <= 7; ++page) EXPECT_TRUE(IsCached(page)) << page;
  EXPECT_TRUE(IsCached(20) && IsCached(43));
  EXPECT_EQ(mapper_.mapped_pages(), 16u);
}

TEST_F(DmaIdleTest, ARunLargerThanTheLimitLeavesItsEnd) {
  Use(0, 20)->reset();
  EXPECT_EQ(Now().idle_pages, 16u);
  EXPECT_FALSE(IsCached(3));
  EXPECT_TRUE(IsCached(4));
}

TEST_F(DmaIdleTest, IdlePagesGoFirstUnderThePinLimit) {
  Use(0, 16)->reset();
  auto use = Use(40, 12);
  ASSERT_THAT(use, IsOk());  // 28 pages, of 24
  EXPECT_EQ(UniquePins(), 16u);
  EXPECT_EQ(Now().evicted_pages, 12u);
  // What the request itself found idle is not what goes for it.
  auto over_idle = Use(12, 12);
  ASSERT_THAT(over_idle, IsOk());
  EXPECT_EQ(mapper_.maps_of_page.at(12), 1u);
  EXPECT_EQ(UniquePins(), 24u);
  EXPECT_THAT(Use(100, 1), FailsWith(ErrorCode::kLimit));
  EXPECT_EQ(UniquePins(), 24u);
}

TEST_F(DmaIdleTest, IdlePagesGoWhenTheMapperIsFull) {
  Use(0, 8)->reset();
  mapper_.fail_at_call = 1;
  EXPECT_THAT(Use(40, 4), IsOk());
  EXPECT_EQ(Now().evicted_pages, 4u);
  EXPECT_EQ(UniquePins(), 8u);
}

TEST_F(DmaIdleTest, AFailedRequestPutsIdlePagesBack) {
  Use(0, 8)->reset();
  EXPECT_THAT(Use(0, 25), FailsWith(ErrorCode::kLimit));
  EXPECT_EQ(Now().idle_pages, 8u);
  EXPECT_EQ(UniquePins(), 8u);
  EXPECT_THAT(UseContiguous(4, 8), FailsWith(ErrorCode::kNotContiguous));
  EXPECT_EQ(Now().idle_pages, 8u);
  EXPECT_EQ(UniquePins(), 8u);
}

TEST_F(DmaIdleTest, ARevocationTakesIdlePagesSilently) {
  ASSERT_THAT(MapRam(200, 0, 8), IsOk());
  Use(200, 8)->reset();
  auto use = Use(202, 2);
  UnmapRam(200, 8);
  EXPECT_EQ(user_->told.size(), 1u);  // for what it holds
  EXPECT_EQ(Now().idle_pages, 0u);
  EXPECT_EQ(UniquePins(), 0u);
  ASSERT_THAT(MapRam(200, 8, 8), IsOk());
  Use(200, 8)->reset();
  UnmapRam(200, 8);
  EXPECT_EQ(user_->told.size(), 1u);
  EXPECT_EQ(Now().cached_pages, 0u);
  EXPECT_EQ(Now().evicted_pages, 0u);
}

TEST_F(DmaIdleTest, WhatIsReleasedDuringItsRevocationDoesNotBecomeIdle) {
  ASSERT_THAT(MapRam(200, 0, 8), IsOk());
  auto use = Use(200, 8);
  user_->when_told = [&](IovaRange) {
    use->reset();
    EXPECT_EQ(Now().idle_pages, 0u);
  };
  UnmapRam(200, 8);
  EXPECT_EQ(UniquePins(), 0u);
}

TEST_F(DmaIdleTest, AnIdlePageIsNotDirty) {
  domain_->start_dirty_log();
  Use(0, 4, Direction::kBidirectional)->reset();
  EXPECT_EQ(Now().idle_pages, 4u);
  EXPECT_EQ(DirtyPages(), 0xfu);  // once, after its end
  EXPECT_EQ(DirtyPages(), 0u);
  auto writer = Use(1, 1, Direction::kFromDevice);
  EXPECT_EQ(mapper_.map_calls, 1u);
  EXPECT_EQ(DirtyPages(), 2u);
  writer->reset();
  EXPECT_EQ(DirtyPages(), 2u);
  EXPECT_EQ(DirtyPages(), 0u);
  domain_->stop_dirty_log();
}

TEST_F(DmaIdleTest, WriteOnlyMemoryDoesNotBecomeIdle) {
  ASSERT_THAT(MapRam(200, 0, 2, domain::Access::kWrite), IsOk());
  auto use = Use(200, 2, Direction::kFromDevice);
  ASSERT_THAT(use, IsOk());
  use->reset();
  EXPECT_EQ(Now().cached_pages, 0u);
}

}  // namespace
}  // namespace mvgpu::dma
