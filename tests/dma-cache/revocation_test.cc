// How the cache takes pages from their users: when the VMM unmaps them, and when they moved.

#include <array>
#include <thread>

#include "tests/dma-cache/dma_cache_fixture.h"

namespace mvgpu::dma {
namespace {

using namespace testing;
using ::testing::ElementsAre;

class DmaRevocationTest : public DmaCacheFixture {};

// GVT-g let the old page go before the hardware's entry was replaced and flushed (kernel-anchors
// #24).
TEST_F(DmaRevocationTest, TheOrderIsUserMapperFlushPin) {
  ASSERT_THAT(MapRam(200, 0, 4), IsOk());
  auto use = Use(200, 4);
  std::vector<std::string> order;
  const auto note = [&](const char* what) {
    order.push_back(what);
    EXPECT_EQ(UniquePins(), 4u) << what;  // until the end
  };
  user_->when_told = [&](IovaRange) {
    note("user");
    EXPECT_EQ(mapper_.mapped_pages(), 4u);
  };
  mapper_.on_unmap = [&] { note("unmap"); };
  mapper_.on_flush = [&] {
    note("flush");
    EXPECT_EQ(mapper_.mapped_pages(), 0u);
  };
  pins_->on_unpin = [&] { order.push_back("unpin"); };
  UnmapRam(200, 4);
  mapper_.on_unmap = mapper_.on_flush = pins_->on_unpin = nullptr;
  EXPECT_THAT(order, ElementsAre("user", "unmap", "flush", "unpin"));
  EXPECT_FALSE(use->is_valid());
  std::vector<std::byte> copy(16);
  EXPECT_THAT(use->read(Iova(BytesIn(200)), copy), FailsWith(ErrorCode::kRevoked));
  EXPECT_EQ(UniquePins(), 0u);
  EXPECT_EQ(Now().revoked_pages, 4u);
  EXPECT_EQ(cache_->address_of(Iova(BytesIn(200))), std::nullopt);
}

TEST_F(DmaRevocationTest, OnlyHoldersAreToldAndOnce) {
  ASSERT_THAT(MapRam(200, 0, 8), IsOk());
  Party other(&*cache_);
  Party elsewhere(&*cache_);
  auto a = Use(200, 4);
  auto b = Use(202, 4, Direction::kFromDevice);
  auto c = UseBy(other, 207, 1);
  auto d = UseBy(elsewhere, 0, 8);
  UnmapRam(200, 8);
  EXPECT_EQ(user_->told, std::vector{MakeRange(BytesIn(200), BytesIn(8))});
  EXPECT_EQ(other.told.size(), 1u);
  EXPECT_TRUE(elsewhere.told.empty());
  EXPECT_EQ(Now().revocations, 2u);
  EXPECT_TRUE(d->is_valid());
}

TEST_F(DmaRevocationTest, AUserMayLetGoWhenItIsTold) {
  ASSERT_THAT(MapRam(200, 0, 4), IsOk());
  auto use = Use(200, 4);
  auto loose = UsePages({201, 203});
  user_->when_told = [&](IovaRange) {
    use->reset();
    EXPECT_THAT(Release(*loose), IsOk());
    EXPECT_EQ(mapper_.mapped_pages(), 0u);
  };
  UnmapRam(200, 4);
  EXPECT_EQ(UniquePins(), 0u);
  EXPECT_EQ(Now().unmapped_pages, 4u);
}

TEST_F(DmaRevocationTest, MeanwhileNewHoldsAreRefusedThereAndFineElsewhere) {
  ASSERT_THAT(MapRam(200, 0, 4), IsOk());
  Party other(&*cache_);
  auto use = Use(200, 4);
  auto theirs = UseBy(other, 200, 1);
  const DmaAddr address = use->runs().front().address;
  EXPECT_THAT(cache_->iovas_of(address), ElementsAre(Iova(BytesIn(200))));
  DmaMapping moved;
  user_->when_told = [&](IovaRange) {
    EXPECT_THAT(Use(200, 1), FailsWith(ErrorCode::kBusy));
    EXPECT_THAT(UseBy(other, 200, 1), FailsWith(ErrorCode::kBusy));
    EXPECT_THAT(UsePages({202}), FailsWith(ErrorCode::kBusy));
    EXPECT_EQ(cache_->address_of(Iova(BytesIn(200))), std::nullopt);
    EXPECT_THAT(cache_->iovas_of(address), ElementsAre());
    moved = std::move(*Use(8, 4));
  };
  UnmapRam(200, 4);
  EXPECT_TRUE(moved.is_valid());
  EXPECT_EQ(Now().cached_pages, 4u);
}

// Of two pages with one address, the other one stays known by it.
TEST_F(DmaRevocationTest, TheIovasOfAnAddressAreThoseThatHaveIt) {
  mapper_.addresses = CountingMapper::Addresses::kHost;
  ASSERT_THAT(MapRam(200, 0, 4), IsOk());  // the same memory as at 0
  auto low = Use(0, 4);
  auto high = Use(200, 4);
  const DmaAddr shared = *cache_->address_of(Iova(BytesIn(1)));
  int told = 0;
  user_->when_told = [&](IovaRange) {
    ++told;
    EXPECT_EQ(cache_->address_of(Iova(BytesIn(201))), std::nullopt);
    EXPECT_THAT(cache_->iovas_of(shared), ElementsAre(Iova(BytesIn(1))));
  };
  UnmapRam(200, 4);
  EXPECT_EQ(told, 1);
  EXPECT_THAT(cache_->iovas_of(shared), ElementsAre(Iova(BytesIn(1))));
}

// KVMGT's holders of a revoked entry found a later one and released that (kernel-anchors #21).
TEST_F(DmaRevocationTest, ARevokedUseDoesNotReleaseWhatWasMappedAfterIt) {
  ASSERT_THAT(MapRam(200, 0, 4), IsOk());
  auto old_use = Use(200, 4);
  auto old_loose = UsePages({201, 201});
  UnmapRam(200, 4);
  ASSERT_THAT(MapRam(200, 8, 4), IsOk());
  auto new_use = Use(200, 4);
  auto new_loose = UsePages({201});
  EXPECT_FALSE(old_use->is_valid());
  old_use->reset();
  EXPECT_THAT(Release(*old_loose), IsOk());
  EXPECT_TRUE(new_use->is_valid());
  EXPECT_EQ(mapper_.mapped_pages(), 4u);
  new_use->reset();
  EXPECT_EQ(mapper_.mapped_pages(), 1u);
  EXPECT_THAT(Release(*new_loose), IsOk());
  EXPECT_EQ(mapper_.mapped_pages(), 0u);
}

TEST_F(DmaRevocationTest, HandlesOfEveryEpochAreReleasedExactly) {
  ASSERT_THAT(MapRam(200, 0, 4), IsOk());
  auto steady = Use(0, 8);
  std::vector<DmaMapping> stale;
  for (int epoch = 0; epoch < 5; ++epoch) {
    stale.push_back(std::move(*Use(200, 1 + static_cast<uint64_t>(epoch) % 4)));
    stale.push_back(std::move(*Use(200, 4)));
    UnmapRam(200, 4);
    ASSERT_THAT(MapRam(200, 0, 4), IsOk());
  }
  auto live = Use(200, 4);
  for (size_t i = 0; i < stale.size(); ++i) {
    EXPECT_FALSE(stale[i * 7 % stale.size()].is_valid());
    stale[i * 7 % stale.size()].reset();
    EXPECT_TRUE(live->is_valid());
    EXPECT_EQ(mapper_.mapped_pages(), 12u);
  }
  EXPECT_TRUE(steady->is_valid());
  steady->reset();
  EXPECT_EQ(mapper_.mapped_pages(), 4u);
}

TEST_F(DmaRevocationTest, ARevocationOfAPartLeavesTheRestToBeReleasedOnce) {
  ASSERT_THAT(MapRam(200, 0, 4), IsOk());
  ASSERT_THAT(MapRam(204, 4, 4), IsOk());  // one run of backing with the one before
  auto use = Use(200, 8);
  EXPECT_EQ(use->runs().size(), 1u);
  UnmapRam(200, 4);
  EXPECT_FALSE(use->is_valid());
  EXPECT_EQ(UniquePins(), 4u);
  ASSERT_THAT(MapRam(200, 0, 4), IsOk());
  auto again = Use(200, 8);
  use->reset();
  EXPECT_TRUE(again->is_valid());
  EXPECT_EQ(UniquePins(), 8u);
  again->reset();
  EXPECT_EQ(UniquePins(), 0u);
  EXPECT_EQ(mapper_.mapped_pages(), 0u);
}

TEST_F(DmaRevocationTest, PartsOfALargeUseGoAndTheRestStays) {
  ASSERT_THAT(MapRam(1024, 0, 600), IsOk());
  ASSERT_THAT(MapRam(1624, 600, 100), IsOk());
  auto large = Use(1024, 700);
  auto small = Use(1620, 8);
  UnmapRam(1624, 100);
  EXPECT_FALSE(large->is_valid());
  EXPECT_EQ(UniquePins(), 600u);
  large->reset();
  EXPECT_EQ(UniquePins(), 4u);
  small->reset();
  EXPECT_EQ(UniquePins(), 0u);
}

TEST_F(DmaRevocationTest, AnUnmapThatAnotherOwnerRefusesTakesThePagesAllTheSame) {
  struct Stubborn final : domain::PinOwner {
    std::string_view pin_owner_name() const override { return "stubborn"; }
    void on_revoke(IovaRange) override {}
  } stubborn;
  ASSERT_THAT(MapRam(200, 0, 4), IsOk());
  auto context = domain_->open_context(&stubborn);
  auto pin = context->pin(MakeRange(BytesIn(200), BytesIn(1)), domain::Access::kRead);
  auto use = Use(200, 4);
  EXPECT_THAT(container_.unmap(Iova(BytesIn(200)), BytesIn(4)), FailsWith(ErrorCode::kBusy));
  EXPECT_FALSE(use->is_valid());
  auto again = Use(200, 4);  // the range is usable again
  ASSERT_THAT(again, IsOk());
  use->reset();
  EXPECT_TRUE(again->is_valid());
}

TEST_F(DmaRevocationTest, ReadsOfMemoryThatChangedHandsAreRefused) {
  ram_.fill_pattern();
  ASSERT_THAT(MapRam(200, 0, 1), IsOk());
  auto use = Use(200, 1);
  UnmapRam(200, 1);
  ASSERT_THAT(MapRam(200, 9, 1), IsOk());
  std::vector<std::byte> copy(16);
  EXPECT_THAT(use->read(Iova(BytesIn(200)), copy), FailsWith(ErrorCode::kRevoked));
  EXPECT_THAT(Use(200, 1)->read(Iova(BytesIn(200)), copy), IsOk());
  EXPECT_EQ(std::memcmp(copy.data(), ram_.at(BytesIn(9)), 16), 0);
}

TEST_F(DmaRevocationTest, WhatMovedIsTakenAndMappedAnew) {
  auto use = Use(0, 16);
  auto other = Use(32, 4);
  EXPECT_EQ(cache_->recheck(), 0u);
  EXPECT_TRUE(user_->told.empty());
  mapper_.moved = {3, 9, 10};
  EXPECT_EQ(cache_->recheck(), 3u);
  EXPECT_THAT(user_->told,
              ElementsAre(MakeRange(BytesIn(3), BytesIn(1)), MakeRange(BytesIn(9), BytesIn(2))));
  EXPECT_FALSE(use->is_valid());
  EXPECT_TRUE(other->is_valid());
  EXPECT_EQ(UniquePins(), 17u);
  mapper_.moved.clear();
  auto again = Use(0, 16);
  ASSERT_THAT(again, IsOk());
  ExpectTrueAddresses(*again);
  EXPECT_EQ(mapper_.maps_of_page.at(3), 2u);
  EXPECT_EQ(mapper_.maps_of_page.at(4), 1u);
  use->reset();
  EXPECT_TRUE(again->is_valid());
}

TEST_F(DmaRevocationTest, PagesThatAreMappedWhileOthersMoveAreNotTaken) {
  Party other(&*cache_);
  auto use = Use(0, 4);
  mapper_.moved = {1};
  DmaMapping fresh;
  user_->when_told = [&](IovaRange) {
    mapper_.moved.clear();
    use->reset();  // page 1 goes, and comes again by another user
    fresh = std::move(*UseBy(other, 0, 4));
  };
  EXPECT_EQ(cache_->recheck(), 1u);
  EXPECT_TRUE(fresh.is_valid());
  ExpectTrueAddresses(fresh);
}

TEST_F(DmaRevocationTest, ThreadsUseWhileAnotherRevokes) {
  ASSERT_THAT(MapRam(200, 0, 32), IsOk());
  std::vector<std::thread> threads;
  for (uint64_t t = 0; t < 3; ++t) {
    threads.emplace_back([this, t] {
      Party party(&*cache_);
      std::array<std::byte, 256> bytes;
      for (uint64_t i = 0; i < 1000; ++i) {
        const uint64_t page = (t * 5 + i) % 100;
        auto use = UseBy(party, page, 10);
        ASSERT_THAT(use, IsOk());
        ASSERT_THAT(use->read(Iova(BytesIn(page)), bytes), IsOk());
        // May fail while the range is unmapped, and be revoked.
        auto risky = UseBy(party, 200 + (t + i) % 24, 8);
        if (risky) static_cast<void>(risky->read(Iova(BytesIn(200 + (t + i) % 24)), bytes));
        const std::array pages{Iova(BytesIn(200 + i % 32)), Iova(BytesIn(page))};
        std::array<DmaAddr, 2> addresses;
        if (auto epoch = party->map_pages(pages, Direction::kFromDevice, addresses)) {
          ASSERT_THAT(party->unmap_pages(pages, Direction::kFromDevice, *epoch), IsOk());
        }
      }
    });
  }
  threads.emplace_back([this] {
    for (int i = 0; i < 300; ++i) {
      UnmapRam(200, 32);
      ASSERT_THAT(MapRam(200, 0, 32), IsOk());
    }
  });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(Now().cached_pages, 0u);
  EXPECT_EQ(Now().miss_pages, Now().unmapped_pages);
}

}  // namespace
}  // namespace mvgpu::dma
