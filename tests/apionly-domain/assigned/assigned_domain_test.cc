#include "apionly-domain/assigned/assigned_domain.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "apionly-domain/assigned/software_iommu.h"
#include "apionly-domain/container.h"
#include "tests/apionly-domain/domain_fixture.h"

namespace mvgpu::domain {
namespace {

using testing::FailsWith;
using ::testing::HasSubstr;
using testing::IsOk;
using testing::IsOkAndHolds;
using testing::MakeRange;

// A VM with an api-only domain and an assigned device, whose view is asked for.
class AssignedDomainTest : public DomainTest {
 protected:
  void SetUp() override {
    DomainTest::SetUp();
    auto iommu = std::make_unique<SoftwareIommu>();
    iommu_ = iommu.get();
    space_.emplace(std::move(iommu), AssignedSpace::Options{.prefer_below = Iova(0)});
    auto assigned = AssignedDomain::Create({.name = "nic"}, &*space_, /*ledger=*/nullptr);
    ASSERT_THAT(assigned, IsOk());
    assigned_ = std::move(*assigned);
    ram_.fill_pattern();
  }
  void TearDown() override {
    owner_.held.reset();
    if (is_attached_) Detach();
    EXPECT_EQ(iommu_->counters().mappings, 0u);
    DomainTest::TearDown();
  }
  void Attach() {
    ASSERT_THAT(container_.attach(assigned_.get()), IsOk());
    is_attached_ = true;
  }
  void Detach() {
    ASSERT_THAT(container_.detach(assigned_.get()), IsOk());
    is_attached_ = false;
  }
  // What the device reads at an address: a byte of RAM, or nothing.
  std::optional<std::byte> Read(uint64_t iova) {
    const std::byte* host = iommu_->translate(Iova(iova), Access::kRead);
    return host == nullptr ? std::nullopt : std::optional(*host);
  }
  AssignedDomain::Found Use(uint64_t iova, uint64_t size, Access access = Access::kReadWrite) {
    owner_.held.emplace(*Pin(iova, size, access));
    EXPECT_EQ(owner_.held->runs().size(), 1u);
    return assigned_->use(owner_.held->runs().front(), access);
  }

  SoftwareIommu* iommu_ = nullptr;  // of space_
  std::optional<AssignedSpace> space_;
  std::unique_ptr<AssignedDomain> assigned_;
  bool is_attached_ = false;
};

TEST_F(AssignedDomainTest, ADeviceThatComesLateSeesWhatIsMappedAndWhatComes) {
  Map(0x100000, 0x4000, 0x3000);
  Attach();
  Map(0x40000000, 0x10000, 0x2000);
  EXPECT_EQ(Read(0x101010), *ram_.at(0x5010));
  EXPECT_EQ(Read(0x40001fff), *ram_.at(0x11fff));
  EXPECT_EQ(Read(0x103000), std::nullopt);
  EXPECT_THAT(container_.unmap(Iova(0x100000), 0x3000), IsOkAndHolds(0x3000u));
  EXPECT_EQ(Read(0x101010), std::nullopt);
  EXPECT_EQ(Read(0x40001fff), *ram_.at(0x11fff));
}

TEST_F(AssignedDomainTest, ADeviceThatLeavesEarlySeesNothingAnyMore) {
  Attach();
  Map(0x100000, 0x4000, 0x3000);
  ASSERT_NE(Read(0x100000), std::nullopt);
  Detach();
  EXPECT_EQ(Read(0x100000), std::nullopt);
  EXPECT_EQ(container_.totals().mappings, 1u);
}

TEST_F(AssignedDomainTest, RightsAreTheVmms) {
  Attach();
  Map(0x100000, 0, 0x1000, Access::kRead);
  EXPECT_NE(iommu_->translate(Iova(0x100000), Access::kRead), nullptr);
  EXPECT_EQ(iommu_->translate(Iova(0x100000), Access::kWrite), nullptr);
}

TEST_F(AssignedDomainTest, MemoryWithoutAFileIsLeftOut) {
  Attach();
  MapWithoutFile(0xc0000000, 0x2000);
  EXPECT_EQ(Read(0xc0000000), std::nullopt);
  EXPECT_THAT(container_.unmap(Iova(0xc0000000), 0x2000), IsOkAndHolds(0x2000u));
}

TEST_F(AssignedDomainTest, WhereTheIommuHasNoAddressesTheVmmsMappingIsRefused) {
  Attach();
  EXPECT_THAT(container_.map(ram_.map_request(0xfedff000, 0, 0x2000)),
              FailsWith(ErrorCode::kNotReachable));
  EXPECT_EQ(container_.totals().mappings, 0u);
  EXPECT_EQ(domain_->counters().mapped_pages, 0u);
}

TEST_F(AssignedDomainTest, AnIommuThatTakesNoMoreRefusesToJoin) {
  Map(0x100000, 0, 0x1000);
  Map(0xfedff000, 0x8000, 0x2000);
  EXPECT_THAT(container_.attach(assigned_.get()), FailsWith(ErrorCode::kNotReachable));
  EXPECT_EQ(space_->counters().mapped_pages, 0u);  // the first one has gone again
}

TEST_F(AssignedDomainTest, AnUnmapThatSomebodyElseRefusesChangesNothing) {
  Attach();
  Map(0x100000, 0x4000, 0x3000);
  owner_.held.emplace(*Pin(0x100000, 0x1000));
  owner_.lets_go = false;
  EXPECT_THAT(container_.unmap(Iova(0x100000), 0x3000), FailsWith(ErrorCode::kBusy));
  EXPECT_EQ(Read(0x100000), *ram_.at(0x4000));
}

TEST_F(AssignedDomainTest, AMappingThatTheVmmCutsIsCutForTheDevice) {
  Attach();
  Map(0x100000, 0x4000, 0x5000);
  ASSERT_THAT(container_.unmap(Iova(0x101000), 0x2000, Container::Cut::kSplit), IsOk());
  EXPECT_EQ(Read(0x100000), *ram_.at(0x4000));
  EXPECT_EQ(Read(0x101000), std::nullopt);
  EXPECT_EQ(Read(0x102fff), std::nullopt);
  EXPECT_EQ(Read(0x103000), *ram_.at(0x7000));
  EXPECT_EQ(Use(0x103000, 0x2000).address, Iova(0x103000));
  assigned_->give_back(MakeRange(0x103000, 0x2000));
}

TEST_F(AssignedDomainTest, AnAddressInUseIsTheVmmsOwn) {
  Attach();
  Map(0x100000, 0x4000, 0x3000);
  const auto found = Use(0x101000, 0x2000);
  EXPECT_EQ(found.address, Iova(0x101000));
  EXPECT_EQ(found.pages, 2u);
  EXPECT_EQ(assigned_->used_pages(), 2u);
  assigned_->give_back(MakeRange(0x101000, 0x1000));
  assigned_->give_back(MakeRange(0x102000, 0x1000));
  EXPECT_EQ(assigned_->used_pages(), 0u);
}

TEST_F(AssignedDomainTest, SaysForHowManyPagesItHasNoAddress) {
  Map(0x100000, 0x4000, 0x1000);
  Map(0x101000, 0x5000, 0x1000);
  EXPECT_EQ(Use(0x100000, 0x2000).pages, 2u);  // not attached: for none
  Attach();
  const auto found = Use(0x100000, 0x2000);
  EXPECT_EQ(found.address, Iova(0x100000));
  EXPECT_EQ(found.pages, 1u);  // the next page is another mapping
  assigned_->give_back(MakeRange(0x100000, 0x1000));
}

TEST_F(AssignedDomainTest, ItHasNoAddressForMoreThanItsDeviceMayDo) {
  Attach();
  Map(0x100000, 0x4000, 0x1000, Access::kRead);
  owner_.held.emplace(*Pin(0x100000, 0x1000, Access::kRead));
  const PinnedRun run = owner_.held->runs().front();
  EXPECT_EQ(assigned_->use(run, Access::kReadWrite).address, std::nullopt);
  EXPECT_EQ(assigned_->use(run, Access::kRead).address, Iova(0x100000));
  assigned_->give_back(run.iova);
}

TEST_F(AssignedDomainTest, ItDoesNotLeaveWhileItsAddressesAreInUse) {
  Attach();
  Map(0x100000, 0x4000, 0x1000);
  ASSERT_TRUE(Use(0x100000, 0x1000).address);
  const auto detached = container_.detach(assigned_.get());
  ASSERT_THAT(detached, FailsWith(ErrorCode::kBusy));
  EXPECT_THAT(detached.error().message(), HasSubstr("nic"));
  EXPECT_EQ(Read(0x100000), *ram_.at(0x4000));
  assigned_->give_back(MakeRange(0x100000, 0x1000));
}

TEST_F(AssignedDomainTest, AddressesHandedOutStayClearOfGuestMemory) {
  Attach();
  const AssignedSpace::HostRun page{ram_.at(0), kPageSize};
  const auto range = space_->map({&page, 1}, Access::kRead);
  ASSERT_THAT(range, IsOk());
  EXPECT_EQ(range->last(), Iova((1ull << 48) - 1));
  Map(0xfff00000, 0, 0x1000);
  EXPECT_THAT(container_.map(ram_.map_request(range->start().value(), 0x8000, 0x1000)),
              FailsWith(ErrorCode::kOverlap));
  space_->unmap(*range);
}

}  // namespace
}  // namespace mvgpu::domain
