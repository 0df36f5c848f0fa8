#include "backend/policies/shown_pages.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <memory>
#include <utility>

#include "apionly-domain/assigned/software_iommu.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::backend {
namespace {

using domain::Access;
using testing::FailsWith;
using testing::IsOk;

// Nothing is dereferenced here: any address will do for host memory.
std::byte* HostOf(uint64_t page) { return std::bit_cast<std::byte*>(BytesIn(0x7000 + page)); }

class ShownPagesTest : public ::testing::Test {
 protected:
  ShownPagesTest() {
    auto iommu = std::make_unique<domain::SoftwareIommu>();
    iommu_ = iommu.get();
    space_ = std::make_unique<domain::AssignedSpace>(
        std::move(iommu), domain::AssignedSpace::Options{.prefer_below = Iova(0)});
    shown_ = std::make_unique<ShownPages>(space_.get());
  }
  Result<void> Add(PageRun pages) { return shown_->add({RangeOf(pages), HostOf(pages.first)}); }
  bool IsShown(uint64_t page) {
    return iommu_->translate(Iova(BytesIn(page)), Access::kReadWrite) == HostOf(page);
  }

  domain::SoftwareIommu* iommu_ = nullptr;  // of space_
  std::unique_ptr<domain::AssignedSpace> space_;
  std::unique_ptr<ShownPages> shown_;
};

TEST_F(ShownPagesTest, APageIsThereAsLongAsSomebodyWantsIt) {
  ASSERT_THAT(Add({10, 4}), IsOk());
  ASSERT_THAT(Add({8, 8}), IsOk());
  for (uint64_t page = 8; page < 16; ++page) EXPECT_TRUE(IsShown(page)) << page;
  shown_->remove({10, 4});
  for (uint64_t page = 8; page < 16; ++page) EXPECT_TRUE(IsShown(page)) << page;
  ASSERT_THAT(Add({12, 1}), IsOk());
  shown_->remove({8, 8});
  for (uint64_t page = 8; page < 16; ++page) EXPECT_EQ(IsShown(page), page == 12) << page;
  shown_->remove({12, 1});
  EXPECT_FALSE(IsShown(12));
}

TEST_F(ShownPagesTest, WhatCannotBeShownChangesNothing) {
  ASSERT_THAT(Add({0xfedfc, 2}), IsOk());
  // The second stretch runs into where a PC raises interrupts.
  EXPECT_THAT(Add({0xfedfb, 8}), FailsWith(ErrorCode::kNotReachable));
  EXPECT_FALSE(IsShown(0xfedfb));
  EXPECT_TRUE(IsShown(0xfedfc));
  EXPECT_TRUE(IsShown(0xfedfd));
  EXPECT_FALSE(IsShown(0xfedfe));
  // Nobody counts on what was not shown: the next one is the first.
  ASSERT_THAT(Add({0xfedfe, 1}), IsOk());
  EXPECT_TRUE(IsShown(0xfedfe));
  shown_->remove({0xfedfe, 1});
  shown_->remove({0xfedfc, 2});
  EXPECT_FALSE(IsShown(0xfedfc));
  EXPECT_EQ(space_->counters().mapped_pages, 0u);
}

}  // namespace
}  // namespace mvgpu::backend
