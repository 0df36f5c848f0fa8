#include "apionly-domain/assigned/assigned_space.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <bit>
#include <map>
#include <optional>
#include <random>
#include <thread>
#include <vector>

#include "apionly-domain/assigned/software_iommu.h"
#include "apionly-domain/assigned/type1_container.h"
#include "tests/fakes/fake_vfio_kernel.h"
#include "tests/fakes/guest_ram.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::domain {
namespace {

using testing::FailsWith;
using testing::FakeVfioKernel;
using testing::IsOk;
using testing::IsOkAndHolds;
using testing::MakeRange;
using HostRun = AssignedSpace::HostRun;

std::byte* Host(uint64_t address) { return std::bit_cast<std::byte*>(address); }

// In front of the software IOMMU, which is asked what a device would see.
class AssignedSpaceTest : public ::testing::Test {
 protected:
  void SetUp() override { Start({}); }
  void Start(AssignedSpace::Options options) {
    auto iommu = std::make_unique<SoftwareIommu>();
    iommu_ = iommu.get();
    space_.emplace(std::move(iommu), options);
  }
  std::byte* See(uint64_t iova) { return iommu_->translate(Iova(iova), Access::kRead); }

  SoftwareIommu* iommu_ = nullptr;  // of space_
  std::optional<AssignedSpace> space_;
};

TEST_F(AssignedSpaceTest, ScatteredMemoryLiesInARowForTheDevice) {
  const std::vector<HostRun> runs = {{Host(0x900000), 0x2000}, {Host(0x100000), 0x1000}};
  const auto range = space_->map(runs, Access::kRead);
  ASSERT_THAT(range, IsOkAndHolds(MakeRange(0xffffd000, 0x3000)));
  EXPECT_EQ(See(0xffffd000), Host(0x900000));
  EXPECT_EQ(See(0xffffe008), Host(0x901008));
  EXPECT_EQ(See(0xfffff000), Host(0x100000));
  EXPECT_EQ(iommu_->translate(Iova(0xfffff000), Access::kWrite), nullptr);
  EXPECT_EQ(space_->counters().mappings, 2u);
  space_->unmap(*range);
}

TEST_F(AssignedSpaceTest, ACutTakesAwayWhatIsToGoAndNothingElse) {
  ASSERT_THAT(space_->map_at(MakeRange(0x10000, 0x8000), Host(0x900000), Access::kRead), IsOk());
  space_->unmap(MakeRange(0x12000, 0x3000));
  space_->flush();
  for (uint64_t page = 0; page < 8; ++page) {
    const bool gone = page >= 2 && page < 5;
    EXPECT_EQ(See(0x10000 + BytesIn(page)), gone ? nullptr : Host(0x900000 + BytesIn(page)));
  }
  EXPECT_EQ(space_->counters().cuts, 1u);
  EXPECT_EQ(space_->counters().mapped_pages, 5u);
  space_->unmap(MakeRange(0x10000, 0x2000));
  space_->unmap(MakeRange(0x15000, 0x3000));
  EXPECT_EQ(space_->counters().cuts, 1u);
}

TEST_F(AssignedSpaceTest, AMappingPerPageIsNeverCut) {
  Start({.maps_each_page = true});
  ASSERT_THAT(space_->map_at(MakeRange(0x10000, 0x8000), Host(0x900000), Access::kRead), IsOk());
  EXPECT_EQ(space_->counters().mappings, 8u);
  space_->unmap(MakeRange(0x12000, 0x3000));
  EXPECT_EQ(space_->counters().cuts, 0u);
  EXPECT_EQ(space_->counters().mappings, 5u);
  space_->unmap(MakeRange(0x10000, 0x2000));
  space_->unmap(MakeRange(0x15000, 0x3000));
}

TEST_F(AssignedSpaceTest, AnIovaIsNotUsedAgainBeforeTheFlush) {
  Start({.prefer_below = Iova(0x2000)});  // below it, there is the page 0x1000 only
  const HostRun page{Host(0x900000), kPageSize};
  const auto first = space_->map({&page, 1}, Access::kRead);
  ASSERT_THAT(first, IsOkAndHolds(MakeRange(0x1000, 0x1000)));
  space_->unmap(*first);
  const auto second = space_->map({&page, 1}, Access::kRead);
  ASSERT_THAT(second, IsOk());
  EXPECT_NE(second->start(), first->start());
  space_->flush();
  EXPECT_THAT(space_->map({&page, 1}, Access::kRead), IsOkAndHolds(*first));
  space_->unmap(*first);
  space_->unmap(*second);
}

TEST_F(AssignedSpaceTest, WishedAddressesThatWereJustUnmappedAreFlushedForTheNext) {
  const IovaRange range = MakeRange(0x10000, 0x1000);
  ASSERT_THAT(space_->map_at(range, Host(0x900000), Access::kRead), IsOk());
  ASSERT_EQ(See(0x10000), Host(0x900000));
  space_->unmap(range);
  ASSERT_THAT(space_->map_at(range, Host(0x800000), Access::kRead), IsOk());
  EXPECT_EQ(See(0x10000), Host(0x800000));  // no stale translation
  EXPECT_THAT(space_->map_at(range, Host(0x700000), Access::kRead), FailsWith(ErrorCode::kOverlap));
  space_->unmap(range);
}

TEST_F(AssignedSpaceTest, ShowsSaysWhatTheDeviceSees) {
  ASSERT_THAT(space_->map_at(MakeRange(0x10000, 0x2000), Host(0x900000), Access::kRead), IsOk());
  ASSERT_THAT(space_->map_at(MakeRange(0x12000, 0x2000), Host(0x902000), Access::kRead), IsOk());
  EXPECT_TRUE(space_->shows(MakeRange(0x11000, 0x2000), Host(0x901000)));
  EXPECT_FALSE(space_->shows(MakeRange(0x11000, 0x2000), Host(0x900000)));
  EXPECT_FALSE(space_->shows(MakeRange(0x13000, 0x2000), Host(0x903000)));
  EXPECT_FALSE(space_->shows(MakeRange(0xf000, 0x2000), Host(0x8ff000)));
  EXPECT_FALSE(space_->shows(MakeRange(0x40000, 0x1000), Host(0x900000)));
  space_->unmap(MakeRange(0x10000, 0x4000));
}

TEST_F(AssignedSpaceTest, CutsAgreeWithAPlainTableOfPages) {
  std::mt19937 random(11);
  constexpr uint64_t kBase = 0x100;  // a page number
  constexpr uint64_t kPages = 256;
  std::map<uint64_t, uint64_t> wanted;  // IOVA page -> host page
  for (int step = 0; step < 1200; ++step) {
    const PageRun run{kBase + random() % kPages, 1 + random() % 24};
    if (random() % 2 == 0) {
      const uint64_t host = 0x10000 + random() % 0x10000;
      const auto done = space_->map_at(RangeOf(run), Host(BytesIn(host)), Access::kRead);
      bool fits = true;
      for (uint64_t page = run.first; page < run.end(); ++page) fits &= !wanted.contains(page);
      ASSERT_EQ(done.has_value(), fits);
      for (uint64_t i = 0; fits && i < run.count; ++i) wanted[run.first + i] = host + i;
    } else {
      for (uint64_t page = run.first; page < run.end(); ++page) {
        uint64_t end = page;
        while (end < run.end() && wanted.erase(end) != 0) ++end;
        if (end == page) continue;
        space_->unmap(RangeOf({page, end - page}));
        page = end;
      }
      space_->flush();
    }
    for (uint64_t page = kBase; page < kBase + kPages + 24; page += 1 + random() % 9) {
      const auto it = wanted.find(page);
      ASSERT_EQ(See(BytesIn(page)), it == wanted.end() ? nullptr : Host(BytesIn(it->second)));
    }
    ASSERT_EQ(space_->counters().mapped_pages, wanted.size());
  }
  for (const auto& [page, host] : wanted) space_->unmap(RangeOf({page, 1}));
  EXPECT_EQ(space_->counters().mappings, 0u);
  EXPECT_EQ(iommu_->counters().mappings, 0u);
}

// A device goes on while mappings come, go and are cut beside what it uses.
TEST_F(AssignedSpaceTest, ADeviceSeesOnlyWhatIsOrWasThereWhileMappingsChange) {
  ASSERT_THAT(space_->map_at(MakeRange(0x10000, 0x4000), Host(0x900000), Access::kRead), IsOk());
  std::atomic<bool> is_done{false};
  std::atomic<uint64_t> wrong{0};
  std::thread device([&] {
    while (!is_done.load()) {
      if (See(0x10000) != Host(0x900000)) ++wrong;  // never touched
      const std::byte* seen = See(0x20000);
      if (seen != nullptr && seen != Host(0x700000) && seen != Host(0x800000)) ++wrong;
    }
  });
  for (int round = 0; round < 500; ++round) {
    const uint64_t host = round % 2 == 0 ? 0x700000 : 0x800000;
    EXPECT_THAT(space_->map_at(MakeRange(0x20000, 0x4000), Host(host), Access::kRead), IsOk());
    space_->unmap(MakeRange(0x21000, 0x1000));
    space_->flush();
    space_->unmap(MakeRange(0x20000, 0x1000));
    space_->unmap(MakeRange(0x22000, 0x2000));
    space_->flush();
    EXPECT_EQ(See(0x20000), nullptr);
  }
  is_done = true;
  device.join();
  EXPECT_EQ(wrong.load(), 0u);
  space_->unmap(MakeRange(0x10000, 0x4000));
}

// In front of type1, whose limits can be reached.
class AssignedSpaceLimitsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto container = Type1Container::Create("7", std::make_unique<FakeVfioKernel>(kernel_));
    ASSERT_THAT(container, IsOk());
    space_.emplace(std::move(*container), AssignedSpace::Options{});
  }
  std::shared_ptr<FakeVfioKernel::State> kernel_ = std::make_shared<FakeVfioKernel::State>();
  std::optional<AssignedSpace> space_;
};

TEST_F(AssignedSpaceLimitsTest, AMapThatFailsHalfwayLeavesNothing) {
  kernel_->entry_limit = 2;
  const std::vector<HostRun> runs = {
      {Host(0x900000), 0x1000}, {Host(0x700000), 0x1000}, {Host(0x500000), 0x1000}};
  EXPECT_THAT(space_->map(runs, Access::kRead), FailsWith(ErrorCode::kLimit));
  EXPECT_TRUE(kernel_->mappings.empty());
  EXPECT_EQ(space_->counters().mapped_pages, 0u);
  EXPECT_EQ(space_->counters().lost_pages, 0u);
  kernel_->entry_limit = 3;
  const auto range = space_->map(runs, Access::kRead);
  ASSERT_THAT(range, IsOk());
  space_->unmap(*range);
}

TEST_F(AssignedSpaceLimitsTest, WhatCannotBeMappedAgainAfterACutIsLostAndNotShown) {
  ASSERT_THAT(space_->map_at(MakeRange(0x10000, 0x8000), Host(0x900000), Access::kRead), IsOk());
  kernel_->entry_limit = 1;
  space_->unmap(MakeRange(0x12000, 0x1000));  // two pieces are left, one may be
  EXPECT_EQ(space_->counters().mapped_pages, 2u);
  EXPECT_EQ(space_->counters().lost_pages, 5u);
  EXPECT_TRUE(space_->shows(MakeRange(0x10000, 0x2000), Host(0x900000)));
  EXPECT_FALSE(space_->shows(MakeRange(0x13000, 0x1000), Host(0x903000)));
  space_->unmap(MakeRange(0x13000, 0x5000));
  EXPECT_EQ(space_->counters().lost_pages, 0u);
  space_->unmap(MakeRange(0x10000, 0x2000));
  EXPECT_TRUE(kernel_->mappings.empty());
}

TEST_F(AssignedSpaceLimitsTest, IsolateThatFailsLeavesTheMappingAsItWas) {
  ASSERT_THAT(space_->map_at(MakeRange(0x10000, 0x8000), Host(0x900000), Access::kRead), IsOk());
  kernel_->entry_limit = 1;
  EXPECT_THAT(space_->isolate(MakeRange(0x12000, 0x1000)), FailsWith(ErrorCode::kLimit));
  EXPECT_TRUE(space_->shows(MakeRange(0x10000, 0x8000), Host(0x900000)));
  EXPECT_EQ(space_->counters().mappings, 1u);
  kernel_->entry_limit = 3;
  ASSERT_THAT(space_->isolate(MakeRange(0x12000, 0x1000)), IsOk());
  EXPECT_TRUE(space_->shows(MakeRange(0x10000, 0x8000), Host(0x900000)));
  EXPECT_EQ(space_->counters().mappings, 3u);
  space_->unmap(MakeRange(0x10000, 0x8000));
}

}  // namespace
}  // namespace mvgpu::domain
