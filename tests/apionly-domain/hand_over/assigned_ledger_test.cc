// What an assigned device's domain holds in the ledger, and who pays, as it comes and goes.

#include <optional>

#include "tests/apionly-domain/hand_over/hand_over_fixture.h"

namespace mvgpu::domain {
namespace {

using testing::FailsWith;
using testing::GuestRam;
using testing::IsOk;
using testing::IsOkAndHolds;
using testing::PageKeeper;

IovaRange Pages(uint64_t first, uint64_t count) { return RangeOf({first, count}); }

class AssignedLedgerTest : public LedgerFixture {
 protected:
  void SetUp() override {
    keeper_.add_view(FileIn(container_, ram_));
    vgpu_.emplace(0, &keeper_, &device_pins_, ledger_.get());
    nic_.emplace("nic", &keeper_, &device_pins_, ledger_.get());
    ASSERT_THAT(container_.attach(vgpu_->get()), IsOk());
  }
  void TearDown() override {
    vgpu_->release_all();
    EXPECT_THAT(container_.unmap_all(), IsOk());
    if (is_attached_) Detach();
    EXPECT_THAT(container_.detach(vgpu_->get()), IsOk());
    vgpu_.reset();
    nic_.reset();
    EXPECT_EQ(keeper_.problem(), "");
    EXPECT_FALSE(ledger_exists()) << "the last domain takes the ledger with it";
  }
  void Attach() {
    ASSERT_THAT(container_.attach(nic_->get()), IsOk());
    is_attached_ = true;
  }
  void Detach() {
    ASSERT_THAT(container_.detach(nic_->get()), IsOk());
    is_attached_ = false;
  }
  Result<void> TryMap(uint64_t iova_page, uint64_t ram_page, uint64_t pages) {
    return container_.map(ram_.map_request(BytesIn(iova_page), BytesIn(ram_page), BytesIn(pages)));
  }
  void Map(uint64_t iova_page, uint64_t ram_page, uint64_t pages) {
    ASSERT_THAT(TryMap(iova_page, ram_page, pages), IsOk());
  }
  Result<uint64_t> Unmap(uint64_t first, uint64_t pages) {
    return container_.unmap(Iova(BytesIn(first)), BytesIn(pages), Container::Cut::kSplit);
  }
  // The row of the domain with that name, of a ledger that is in order.
  LedgerSnapshot::Row Row(std::string_view name) {
    ExpectInOrder();
    const LedgerSnapshot seen = Look();
    EXPECT_EQ(seen.charged_pages(), seen.unique_pages);
    for (const LedgerSnapshot::Row& row : seen.rows) {
      if (row.name == name) return row;
    }
    ADD_FAILURE() << "no row of " << name;
    return {};
  }
  void ExpectNic(uint64_t unique, uint64_t charged, uint64_t mapped) {
    const LedgerSnapshot::Row nic = Row("nic");
    EXPECT_EQ(nic.unique_pages, unique);
    EXPECT_EQ(nic.charged_pages, charged);
    EXPECT_EQ(nic.mapped_pages, mapped);
    EXPECT_EQ(nic.pinned_pages, mapped);
    EXPECT_EQ(nic.locked_pages, nic_->space().counters().mapped_pages);
  }
  void ExpectVgpu(uint64_t unique, uint64_t charged, uint64_t locked) {
    const LedgerSnapshot::Row vgpu = Row("vgpu0");
    EXPECT_EQ(vgpu.unique_pages, unique);
    EXPECT_EQ(vgpu.charged_pages, charged);
    EXPECT_EQ(vgpu.locked_pages, locked);
  }

  GuestRam ram_{64 * kPageSize};
  GuestRam other_ram_{64 * kPageSize};
  PageKeeper keeper_;
  DevicePins device_pins_;
  std::unique_ptr<Ledger> ledger_ = Open();
  Container container_;
  std::optional<WatchedDomain> vgpu_;
  std::optional<WatchedDevice> nic_;
  bool is_attached_ = false;
};

TEST_F(AssignedLedgerTest, TheRowSaysWhatTheDeviceHolds) {
  Attach();
  Map(100, 0, 16);
  const LedgerSnapshot::Row nic = Row("nic");
  EXPECT_EQ(nic.kind, static_cast<uint32_t>(DomainKind::kAssignedDevice));
  EXPECT_EQ(nic.pin_backend, "vfio-type1");
  ExpectNic(16, 16, 16);
  EXPECT_EQ(nic.locked_pages, 16u);
}

TEST_F(AssignedLedgerTest, APageAtTwoAddressesIsHeldOnceAndLockedTwice) {
  Attach();
  Map(100, 0, 16);
  Map(200, 8, 16);
  ExpectNic(24, 24, 32);
  EXPECT_EQ(Row("nic").locked_pages, 32u);
  EXPECT_THAT(Unmap(100, 16), IsOkAndHolds(BytesIn(16)));
  ExpectNic(16, 16, 16);
  EXPECT_THAT(Unmap(200, 16), IsOk());
  ExpectNic(0, 0, 0);
}

TEST_F(AssignedLedgerTest, ChargesMoveBothWays) {
  Map(100, 0, 16);
  ASSERT_THAT(vgpu_->pin(Pages(104, 4)), IsOk());
  ExpectVgpu(4, 4, 4);
  Attach();
  ExpectVgpu(4, 4, 0);  // the lock has gone over, the charge stays with who pays
  ExpectNic(16, 12, 16);
  vgpu_->release_all();
  ExpectVgpu(0, 0, 0);
  ExpectNic(16, 16, 16);
  ASSERT_THAT(vgpu_->pin(Pages(104, 4)), IsOk());
  ExpectVgpu(4, 0, 0);
  Detach();
  ExpectVgpu(4, 4, 4);
  EXPECT_EQ(Row("nic").unique_pages, 0u);
}

TEST_F(AssignedLedgerTest, ACutReleasesWhatWentAndNothingElse) {
  Attach();
  Map(100, 0, 16);
  EXPECT_THAT(Unmap(104, 4), IsOkAndHolds(BytesIn(4)));
  ExpectNic(12, 12, 12);
  EXPECT_THAT(Unmap(100, 16), IsOkAndHolds(BytesIn(12)));
  ExpectNic(0, 0, 0);
}

TEST_F(AssignedLedgerTest, WhatTheIommuRefusesIsNotHeld) {
  Attach();
  Map(100, 0, 4);
  keeper_.fail_at_call(1);
  EXPECT_THAT(TryMap(200, 2, 4), FailsWith(ErrorCode::kLimit));
  ExpectNic(4, 4, 4);
}

TEST_F(AssignedLedgerTest, WhatALaterDeviceRefusesIsNotHeldByTheEarlierOne) {
  WatchedDevice disk("disk", &keeper_, &device_pins_, ledger_.get());
  Attach();
  ASSERT_THAT(container_.attach(disk.get()), IsOk());
  keeper_.fail_at_call(2);
  EXPECT_THAT(TryMap(200, 2, 4), FailsWith(ErrorCode::kLimit));
  ExpectNic(0, 0, 0);
  ASSERT_THAT(container_.detach(disk.get()), IsOk());
}

TEST_F(AssignedLedgerTest, ADeviceThatCannotJoinHoldsNothing) {
  Map(100, 0, 4);
  Map(200, 2, 4);
  keeper_.fail_at_call(2);
  EXPECT_THAT(container_.attach(nic_->get()), FailsWith(ErrorCode::kLimit));
  ExpectNic(0, 0, 0);
}

TEST_F(AssignedLedgerTest, ADeviceThatMayNotLeaveGoesOnPaying) {
  Attach();
  Map(100, 0, 16);
  ASSERT_THAT(vgpu_->pin(Pages(104, 4)), IsOk());
  keeper_.fail_at_call(1);
  EXPECT_THAT(container_.detach(nic_->get()), FailsWith(ErrorCode::kLimit));
  ExpectNic(16, 16, 16);
  ExpectVgpu(4, 0, 0);
}

TEST_F(AssignedLedgerTest, WhatTheLedgerRefusesIsNotMapped) {
  auto crowd = Join(*ledger_);
  for (uint64_t i = 0; i < 255; ++i) ASSERT_THAT(crowd->hold({1, i}, 1, {0, 1}), IsOk());
  Attach();
  Map(100, 0, 4);  // the last file that fits
  EXPECT_THAT(container_.map(other_ram_.map_request(BytesIn(200), 0, BytesIn(4))),
              FailsWith(ErrorCode::kLimit));
  EXPECT_EQ(nic_->space().counters().mapped_pages, 4u);
  for (uint64_t i = 0; i < 255; ++i) crowd->release({1, i}, {0, 1});
}

TEST_F(AssignedLedgerTest, WhatTheIommuLosesIsNotLocked) {
  Attach();
  Map(100, 0, 16);
  keeper_.fail_at_call(1, /*more=*/1);  // the first part of the cut, and the whole
  EXPECT_THAT(Unmap(104, 12), FailsWith(ErrorCode::kLimit));
  ASSERT_EQ(nic_->space().counters().lost_pages, 16u);
  const LedgerSnapshot::Row nic = Row("nic");
  EXPECT_EQ(nic.locked_pages, 0u);
  EXPECT_EQ(nic.unique_pages, 16u) << "the VMM's mapping is still there";
  Detach();
  EXPECT_EQ(Row("nic").locked_pages, 0u);
}

// A software IOMMU shows pages and asks nobody to hold them.
TEST_F(AssignedLedgerTest, AnIommuInSoftwareLocksNothing) {
  AssignedSpace space(std::make_unique<SoftwareIommu>(), {});
  {
    auto soft = AssignedDomain::Create({.name = "soft"}, &space, ledger_.get());
    ASSERT_THAT(soft, IsOk());
    ASSERT_THAT(container_.attach(soft->get()), IsOk());
    Map(100, 0, 16);
    EXPECT_EQ(Row("soft").unique_pages, 16u);
    EXPECT_EQ(Row("soft").locked_pages, 0u);
    ASSERT_THAT(container_.detach(soft->get()), IsOk());
  }
}

}  // namespace
}  // namespace mvgpu::domain
