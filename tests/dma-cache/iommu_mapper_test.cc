#include "dma-cache/iommu_mapper.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <bit>
#include <cstddef>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/assigned/software_iommu.h"
#include "apionly-domain/assigned/type1_container.h"
#include "apionly-domain/container.h"
#include "dma-cache/dma_cache.h"
#include "tests/fakes/dma_party.h"
#include "tests/fakes/fake_pin_backend.h"
#include "tests/fakes/fake_vfio_kernel.h"
#include "tests/fakes/guest_ram.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::dma {
namespace {

using domain::Access;
using domain::AssignedSpace;
using domain::PinnedRun;
using testing::FailsWith;
using testing::FakeVfioKernel;
using testing::GuestRam;
using testing::IsOk;
using testing::MakeRange;

class IommuMapperTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto iommu = std::make_unique<domain::SoftwareIommu>();
    iommu_ = iommu.get();
    Start(std::move(iommu));
  }
  void Start(std::unique_ptr<domain::AssignedIommu> iommu) {
    mapper_.reset();
    space_.emplace(std::move(iommu), AssignedSpace::Options{});
    mapper_.emplace(&*space_);
  }
  PinnedRun Run(uint64_t iova_page, uint64_t ram_page, uint64_t pages) {
    return {MakeRange(BytesIn(iova_page), BytesIn(pages)), ram_.at(BytesIn(ram_page))};
  }
  Result<void> Map(std::vector<PinnedRun> runs, Access access = Access::kReadWrite) {
    return mapper_->map(runs, access, &mapped_);
  }
  void UnmapAll() {
    for (const MappedRun& run : mapped_) mapper_->unmap(run.address, run.iova.size());
    mapper_->flush();
    mapped_.clear();
  }
  std::byte* See(DmaAddr address, Access access = Access::kRead) {
    return iommu_->translate(Iova(address.value()), access);
  }
  uint64_t Figure(std::string_view name) const {
    for (const auto& [key, value] : mapper_->figures())
      if (key == name) return value;
    return UINT64_MAX;
  }

  GuestRam ram_{64 * kPageSize};
  domain::SoftwareIommu* iommu_ = nullptr;  // of space_
  std::optional<AssignedSpace> space_;
  std::optional<IommuMapper> mapper_;
  std::vector<MappedRun> mapped_;
};

TEST_F(IommuMapperTest, ScatteredPagesAreOnePieceForTheDevice) {
  ASSERT_THAT(Map({Run(100, 9, 2), Run(102, 3, 1), Run(103, 30, 3)}), IsOk());
  ASSERT_EQ(mapped_.size(), 1u);
  EXPECT_EQ(mapped_[0].iova, MakeRange(BytesIn(100), BytesIn(6)));
  const uint64_t ram_pages[] = {9, 10, 3, 30, 31, 32};
  for (uint64_t i = 0; i < 6; ++i) {
    EXPECT_EQ(See(mapped_[0].address + BytesIn(i) + 5), ram_.at(BytesIn(ram_pages[i]) + 5));
  }
  UnmapAll();
  EXPECT_EQ(iommu_->counters().mappings, 0u);
}

TEST_F(IommuMapperTest, TheDeviceMayDoWhatTheMappingAllows) {
  ASSERT_THAT(Map({Run(100, 9, 1)}, Access::kRead), IsOk());
  EXPECT_NE(See(mapped_[0].address, Access::kRead), nullptr);
  EXPECT_EQ(See(mapped_[0].address, Access::kWrite), nullptr);
  UnmapAll();
}

TEST_F(IommuMapperTest, APartThatIsUnmappedIsOutOfReachAndTheRestIsNot) {
  ASSERT_THAT(Map({Run(100, 10, 8)}), IsOk());
  const DmaAddr base = mapped_[0].address;
  for (uint64_t i = 0; i < 8; ++i) ASSERT_NE(See(base + BytesIn(i)), nullptr);  // all remembered
  mapper_->unmap(base + BytesIn(3), BytesIn(2));
  mapper_->flush();
  for (uint64_t i = 0; i < 8; ++i) {
    EXPECT_EQ(See(base + BytesIn(i)), i == 3 || i == 4 ? nullptr : ram_.at(BytesIn(10 + i)));
  }
  EXPECT_TRUE(mapper_->is_current(Run(100, 10, 3), base));
  EXPECT_TRUE(mapper_->is_current(Run(105, 15, 3), base + BytesIn(5)));
  EXPECT_FALSE(mapper_->is_current(Run(103, 13, 1), base + BytesIn(3)));
  EXPECT_EQ(Figure("cuts"), 1u);
  mapper_->unmap(base, BytesIn(3));
  mapper_->unmap(base + BytesIn(5), BytesIn(3));
  mapper_->flush();
  EXPECT_EQ(Figure("allocated_pages"), 0u);
}

TEST_F(IommuMapperTest, WithoutAFlushTheDeviceStillReachesWhatItRemembers) {
  ASSERT_THAT(Map({Run(100, 10, 1)}), IsOk());
  const DmaAddr address = mapped_[0].address;
  ASSERT_NE(See(address), nullptr);
  mapper_->unmap(address, kPageSize);
  EXPECT_EQ(See(address), ram_.at(BytesIn(10)));
  mapper_->flush();
  EXPECT_EQ(See(address), nullptr);
}

TEST_F(IommuMapperTest, AnAddressDoesNotComeBackAtOnce) {
  ASSERT_THAT(Map({Run(100, 10, 1)}), IsOk());
  const DmaAddr before = mapped_[0].address;
  UnmapAll();
  ASSERT_THAT(Map({Run(100, 11, 1)}), IsOk());
  EXPECT_NE(mapped_[0].address, before);
  UnmapAll();
}

TEST_F(IommuMapperTest, WhereThereIsNoRowEachRunLiesForItself) {
  auto kernel = std::make_shared<FakeVfioKernel::State>();
  kernel->ranges = {{0x10000, 0x11fff}, {0x20000, 0x20fff}};  // two pages, and one
  auto container = domain::Type1Container::Create("7", std::make_unique<FakeVfioKernel>(kernel));
  ASSERT_THAT(container, IsOk());
  Start(std::move(*container));
  ASSERT_THAT(Map({Run(100, 9, 1), Run(101, 3, 2)}), IsOk());
  EXPECT_EQ(mapped_.size(), 2u);
  EXPECT_EQ(Figure("allocated_pages"), 3u);
  UnmapAll();
  EXPECT_THAT(Map({Run(100, 9, 2), Run(102, 3, 2)}), FailsWith(ErrorCode::kLimit));
  EXPECT_TRUE(mapped_.empty());
  EXPECT_TRUE(kernel->mappings.empty());
  EXPECT_EQ(Figure("allocated_pages"), 0u);
}

TEST_F(IommuMapperTest, WhatTheKernelRefusesLeavesNothingBehind) {
  auto kernel = std::make_shared<FakeVfioKernel::State>();
  kernel->entry_limit = 2;
  auto container = domain::Type1Container::Create("7", std::make_unique<FakeVfioKernel>(kernel));
  ASSERT_THAT(container, IsOk());
  Start(std::move(*container));
  EXPECT_THAT(Map({Run(100, 9, 1), Run(101, 3, 1), Run(102, 20, 1)}), FailsWith(ErrorCode::kLimit));
  EXPECT_TRUE(mapped_.empty());
  EXPECT_TRUE(kernel->mappings.empty());
  EXPECT_EQ(Figure("lost_pages"), 0u);
}

// The search for an address begins anew at the top; what is in use, or not flushed yet, is passed.
TEST_F(IommuMapperTest, WhereTheAddressesWrappedNoneIsHandedOutTwice) {
  auto kernel = std::make_shared<FakeVfioKernel::State>();
  kernel->ranges = {{0x10000, 0x1ffff}};  // 16 pages
  auto container = domain::Type1Container::Create("7", std::make_unique<FakeVfioKernel>(kernel));
  ASSERT_THAT(container, IsOk());
  Start(std::move(*container));
  std::deque<MappedRun> held;
  std::map<DmaAddr, int> times;
  const auto give_back = [&](size_t i) {
    mapper_->unmap(held[i].address, held[i].iova.size());
    held.erase(held.begin() + static_cast<std::ptrdiff_t>(i));
  };
  for (uint64_t i = 0; i < 200; ++i) {
    const uint64_t pages = 1 + i % 3;
    ASSERT_THAT(Map({Run(100 + 4 * i, i % 60, pages)}), IsOk()) << i;
    const MappedRun fresh = mapped_.back();
    mapped_.clear();
    for (const MappedRun& other : held) {
      EXPECT_TRUE(fresh.address + fresh.iova.size() <= other.address ||
                  other.address + other.iova.size() <= fresh.address)
          << i;
    }
    for (uint64_t page = 0; page < pages; ++page) ++times[fresh.address + BytesIn(page)];
    held.push_back(fresh);
    while (held.size() > 3) give_back(i * 5 % held.size());
    if (i % 4 == 0) mapper_->flush();
  }
  EXPECT_GT(times.size(), 12u);
  for (const auto& [address, count] : times) EXPECT_GT(count, 5) << address.value();
  while (!held.empty()) give_back(0);
  mapper_->flush();
}

// Memory of which 2 MiB begin where a page of 2 MiB could.
class LargePagesTest : public IommuMapperTest {
 protected:
  static constexpr uint64_t kTwoMib = 512;  // pages

  static uint64_t FirstAligned(const std::byte* host) {
    return (kTwoMib - PagesIn(std::bit_cast<uint64_t>(host)) % kTwoMib) % kTwoMib;
  }
  PinnedRun LargeRun(uint64_t iova_page, uint64_t ram_page, uint64_t pages) {
    return {MakeRange(BytesIn(iova_page), BytesIn(pages)), large_.at(BytesIn(ram_page))};
  }
  std::array<uint64_t, 3> PageCounts() const { return iommu_->counters().pages; }

  GuestRam large_{(4 * kTwoMib) * kPageSize};
  const uint64_t aligned_ = FirstAligned(large_.at(0));
};

TEST_F(LargePagesTest, LargePagesStayLarge) {
  ASSERT_THAT(Map({LargeRun(100, aligned_, kTwoMib)}), IsOk());
  EXPECT_EQ(PageCounts(), (std::array<uint64_t, 3>{0, 1, 0}));
  UnmapAll();
  // Also what begins and ends beside one, behind addresses that are not aligned any more.
  ASSERT_THAT(Map({Run(50, 3, 1)}), IsOk());
  ASSERT_THAT(Map({LargeRun(100, aligned_ + kTwoMib - 3, kTwoMib + 10)}), IsOk());
  EXPECT_EQ(PageCounts(), (std::array<uint64_t, 3>{1 + 3 + 7, 1, 0}));
  UnmapAll();
}

TEST_F(LargePagesTest, LargePagesStayLargeWhereverInARowTheyAre) {
  ASSERT_THAT(Map({Run(99, 5, 1), LargeRun(100, aligned_, kTwoMib)}), IsOk());
  EXPECT_EQ(mapped_.size(), 1u);
  EXPECT_EQ(PageCounts(), (std::array<uint64_t, 3>{1, 1, 0}));
  UnmapAll();
  const uint64_t second = aligned_ + kTwoMib;
  ASSERT_THAT(Map({Run(97, 5, 2), Run(99, 9, 7), LargeRun(106, second, kTwoMib), Run(618, 1, 30)}),
              IsOk());
  EXPECT_EQ(mapped_.size(), 1u);
  EXPECT_EQ(PageCounts(), (std::array<uint64_t, 3>{2 + 7 + 30, 1, 0}));
  EXPECT_EQ(See(mapped_[0].address + BytesIn(9 + 77)), large_.at(BytesIn(second + 77)));
  EXPECT_EQ(See(mapped_[0].address + BytesIn(8)), ram_.at(BytesIn(15)));
  UnmapAll();
}

// With the VMM's memory, a domain and a cache in front of the mapper.
class CachedLargePagesTest : public LargePagesTest {
 protected:
  void SetUp() override {
    LargePagesTest::SetUp();
    auto domain = domain::ApiOnlyDomain::Create(
        {}, std::make_unique<testing::FakePinBackend>(pins_), nullptr, nullptr);
    ASSERT_THAT(domain, IsOk());
    domain_ = std::move(*domain);
    ASSERT_THAT(container_.attach(domain_.get()), IsOk());
    ASSERT_THAT(container_.map(large_.map_request(BytesIn(4096), 0, BytesIn(2048))), IsOk());
    host_ = container_.mappings().front().file->host_address(0);
    cache_.emplace(domain_.get(), &*mapper_);
    user_.emplace(&*cache_);
  }
  void TearDown() override {
    user_.reset();
    cache_.reset();
    ASSERT_THAT(container_.detach(domain_.get()), IsOk());
    EXPECT_EQ(iommu_->counters().mappings, 0u);
  }
  Result<DmaMapping> Use(uint64_t page, uint64_t count) {
    return (*user_)->map_contiguous(MakeRange(BytesIn(page), BytesIn(count)),
                                    Direction::kBidirectional);
  }

  std::shared_ptr<testing::FakePinBackend::State> pins_ =
      std::make_shared<testing::FakePinBackend::State>();
  domain::Container container_;
  std::unique_ptr<domain::ApiOnlyDomain> domain_;
  std::byte* host_ = nullptr;  // of the file's first page, in the domain's view
  std::optional<DmaCache> cache_;
  std::optional<testing::DmaParty> user_;
};

TEST_F(CachedLargePagesTest, LargePagesStayLarge) {
  const uint64_t first = FirstAligned(host_);
  auto use = Use(4096 + first, kTwoMib);
  ASSERT_THAT(use, IsOk());
  ASSERT_EQ(use->runs().size(), 1u);
  EXPECT_EQ(PageCounts(), (std::array<uint64_t, 3>{0, 1, 0}));
  EXPECT_EQ(See(use->runs()[0].address + 0x12345), host_ + BytesIn(first) + 0x12345);
}

TEST_F(CachedLargePagesTest, LargePagesStayLargeBehindAPageThatLiesElsewhere) {
  const uint64_t first = FirstAligned(host_);
  const uint64_t iova_page = 9001;
  ASSERT_THAT(container_.map(large_.map_request(BytesIn(iova_page), BytesIn(first + 700), 0x1000)),
              IsOk());
  ASSERT_THAT(
      container_.map(large_.map_request(BytesIn(iova_page + 1), BytesIn(first), BytesIn(kTwoMib))),
      IsOk());
  auto use = Use(iova_page, 1 + kTwoMib);
  ASSERT_THAT(use, IsOk());
  ASSERT_EQ(use->runs().size(), 1u);
  EXPECT_EQ(PageCounts(), (std::array<uint64_t, 3>{1, 1, 0}));
}

// Beside a device that sees the VM's memory already.
class SharedIommuMapperTest : public IommuMapperTest {
 protected:
  void SetUp() override {
    IommuMapperTest::SetUp();
    mapper_.reset();
    auto assigned = domain::AssignedDomain::Create({.name = "nic"}, &*space_, /*ledger=*/nullptr);
    ASSERT_THAT(assigned, IsOk());
    assigned_ = std::move(*assigned);
    ASSERT_THAT(container_.attach(assigned_.get()), IsOk());
    mapper_.emplace(&*space_, assigned_.get());
    // IOVA pages 100-107 are RAM pages 8-15, and the page 108 is RAM page 20, for reading only.
    ASSERT_THAT(container_.map(ram_.map_request(BytesIn(100), BytesIn(8), BytesIn(8))), IsOk());
    ASSERT_THAT(
        container_.map(ram_.map_request(BytesIn(108), BytesIn(20), kPageSize, Access::kRead)),
        IsOk());
    host_ = container_.mappings().front().file->host_address(0);
  }
  void TearDown() override {
    UnmapAll();
    EXPECT_EQ(assigned_->used_pages(), 0u);
    ASSERT_THAT(container_.detach(assigned_.get()), IsOk());
  }
  // As the container's own mapping of the file has it.
  PinnedRun Pinned(uint64_t iova_page, uint64_t ram_page, uint64_t pages) {
    return {MakeRange(BytesIn(iova_page), BytesIn(pages)), host_ + BytesIn(ram_page)};
  }

  domain::Container container_;
  std::unique_ptr<domain::AssignedDomain> assigned_;
  std::byte* host_ = nullptr;
};

TEST_F(SharedIommuMapperTest, PagesThatTheDeviceSeesKeepTheirAddress) {
  const uint64_t before = iommu_->counters().mappings;
  ASSERT_THAT(Map({Pinned(102, 10, 4)}), IsOk());
  ASSERT_EQ(mapped_.size(), 1u);
  EXPECT_EQ(mapped_[0].address, DmaAddr(BytesIn(102)));
  EXPECT_EQ(iommu_->counters().mappings, before);
  EXPECT_EQ(Figure("shared_pages"), 4u);
  EXPECT_EQ(Figure("allocated_pages"), 0u);
  EXPECT_TRUE(mapper_->is_current(Pinned(102, 10, 4), mapped_[0].address));
}

TEST_F(SharedIommuMapperTest, WhatTheDeviceMayNotDoThereGetsAnAddressOfItsOwn) {
  ASSERT_THAT(Map({Pinned(106, 14, 2), Pinned(108, 20, 1)}, Access::kReadWrite), IsOk());
  ASSERT_EQ(mapped_.size(), 2u);
  EXPECT_EQ(mapped_[0].address, DmaAddr(BytesIn(106)));
  EXPECT_NE(mapped_[1].address, DmaAddr(BytesIn(108)));
  EXPECT_EQ(See(mapped_[1].address, Access::kWrite), host_ + BytesIn(20));
  EXPECT_EQ(Figure("shared_pages"), 2u);
  EXPECT_EQ(Figure("allocated_pages"), 1u);
}

TEST_F(SharedIommuMapperTest, NewAddressesComeInTheOrderOfTheRuns) {
  ASSERT_THAT(
      container_.map(ram_.map_request(BytesIn(98), BytesIn(30), 2 * kPageSize, Access::kRead)),
      IsOk());
  ASSERT_THAT(Map({Pinned(98, 30, 2), Pinned(100, 8, 2)}), IsOk());
  ASSERT_EQ(mapped_.size(), 2u);
  EXPECT_EQ(mapped_[0].iova, MakeRange(BytesIn(98), BytesIn(2)));
  EXPECT_EQ(See(mapped_[0].address), host_ + BytesIn(30));
  EXPECT_EQ(mapped_[1].iova, MakeRange(BytesIn(100), BytesIn(2)));
  EXPECT_EQ(mapped_[1].address, DmaAddr(BytesIn(100)));
}

TEST_F(SharedIommuMapperTest, TheDeviceKeepsItsViewWhenTheMapperLetsGo) {
  ASSERT_THAT(Map({Pinned(100, 8, 8)}), IsOk());
  mapper_->unmap(DmaAddr(BytesIn(103)), BytesIn(2));  // in cuts
  mapper_->unmap(DmaAddr(BytesIn(100)), BytesIn(3));
  mapper_->unmap(DmaAddr(BytesIn(105)), BytesIn(3));
  mapper_->flush();
  mapped_.clear();
  EXPECT_EQ(See(DmaAddr(BytesIn(103))), host_ + BytesIn(11));
  EXPECT_EQ(Figure("shared_pages"), 0u);
}

// The domain with the pins may join before the assigned device's or behind it.
class SharedCacheTest : public IommuMapperTest, public ::testing::WithParamInterface<bool> {
 protected:
  void SetUp() override {
    IommuMapperTest::SetUp();
    auto assigned = domain::AssignedDomain::Create({.name = "nic"}, &*space_, /*ledger=*/nullptr);
    ASSERT_THAT(assigned, IsOk());
    assigned_ = std::move(*assigned);
    auto domain = domain::ApiOnlyDomain::Create(
        {}, std::make_unique<testing::FakePinBackend>(pins_), nullptr, nullptr);
    ASSERT_THAT(domain, IsOk());
    domain_ = std::move(*domain);
    if (GetParam()) {
      ASSERT_THAT(container_.attach(domain_.get()), IsOk());
    }
    ASSERT_THAT(container_.attach(assigned_.get()), IsOk());
    if (!GetParam()) {
      ASSERT_THAT(container_.attach(domain_.get()), IsOk());
    }
    mapper_.emplace(&*space_, assigned_.get());
    ASSERT_THAT(container_.map(ram_.map_request(BytesIn(100), BytesIn(8), BytesIn(8))), IsOk());
    ASSERT_THAT(container_.map(ram_.map_request(BytesIn(108), BytesIn(16), BytesIn(8))), IsOk());
  }
  void TearDown() override {
    ASSERT_THAT(container_.detach(domain_.get()), IsOk());
    ASSERT_THAT(container_.detach(assigned_.get()), IsOk());
  }

  std::shared_ptr<testing::FakePinBackend::State> pins_ =
      std::make_shared<testing::FakePinBackend::State>();
  domain::Container container_;
  std::unique_ptr<domain::AssignedDomain> assigned_;
  std::unique_ptr<domain::ApiOnlyDomain> domain_;
};

TEST_P(SharedCacheTest, MemoryThatTheVmmTakesAwayIsOutOfTheDevicesReachWhoeverUsedItsAddress) {
  DmaCache cache(domain_.get(), &*mapper_);
  testing::DmaParty party(&cache);
  auto use = party->map(MakeRange(BytesIn(104), BytesIn(8)), Direction::kBidirectional);
  ASSERT_THAT(use, IsOk());
  ASSERT_EQ(use->runs().size(), 1u);
  EXPECT_EQ(use->runs()[0].address, DmaAddr(BytesIn(104)));
  EXPECT_EQ(assigned_->used_pages(), 8u);
  ASSERT_NE(See(DmaAddr(BytesIn(105)), Access::kWrite), nullptr);
  party.when_told = [&](IovaRange) { EXPECT_EQ(assigned_->used_pages(), 8u); };
  ASSERT_THAT(container_.unmap(Iova(BytesIn(100)), BytesIn(8)), IsOk());
  EXPECT_EQ(party.told, std::vector{MakeRange(BytesIn(100), BytesIn(8))});
  EXPECT_FALSE(use->is_valid());
  EXPECT_EQ(assigned_->used_pages(), 4u);  // of the neighbour, which stays
  for (uint64_t page = 100; page < 108; ++page) EXPECT_EQ(See(DmaAddr(BytesIn(page))), nullptr);
  for (uint64_t page = 108; page < 116; ++page) EXPECT_NE(See(DmaAddr(BytesIn(page))), nullptr);
  party.when_told = nullptr;
  ASSERT_THAT(container_.unmap(Iova(BytesIn(108)), BytesIn(8)), IsOk());
  EXPECT_EQ(assigned_->used_pages(), 0u);
  EXPECT_EQ(iommu_->counters().mappings, 0u);
  EXPECT_TRUE(pins_->pages.empty());
  EXPECT_EQ(See(DmaAddr(BytesIn(109)), Access::kWrite), nullptr);
  EXPECT_EQ(cache.counters().cached_pages, 0u);
  use->reset();
}

INSTANTIATE_TEST_SUITE_P(PinsFirst, SharedCacheTest, ::testing::Bool());

}  // namespace
}  // namespace mvgpu::dma
