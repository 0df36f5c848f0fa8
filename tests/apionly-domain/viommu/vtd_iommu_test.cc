// A remapping unit with its caches: what it remembers, what invalidations take away, what it
// records.

#include "tests/apionly-domain/viommu/viommu_fixture.h"

namespace mvgpu::domain {
namespace {

class VtdIommuCachesTest : public VtdIommuTest {
 protected:
  static constexpr uint64_t kMovedLeaf = 0x8000'0000'0567'9067;
  static constexpr uint64_t kMoved = 0x10'0567'9abc;
  void SetUp() override {
    VtdIommuTest::SetUp();
    Put(kSecondLeafAt + 8, 0x10'0567'9003);
  }
  // The guest moves the page of kGva; whether the unit notices after `invalidate`.
  bool IsNoticed(const std::function<void()>& invalidate) {
    Put(kFirstLeafAt, 0x8000'0000'0567'8067);
    InvalidatePasidEntry();
    ExpectTarget(Translate(), kGpa + kOffset);
    Put(kFirstLeafAt, kMovedLeaf);
    ExpectTarget(Translate(), kGpa + kOffset);
    invalidate();
    const VtdResult result = Translate();
    EXPECT_TRUE(result);
    return result && result->address == kMoved;
  }
};

TEST_F(VtdIommuCachesTest, ATranslationIsRememberedUntilItsPasidIsInvalidated) {
  EXPECT_TRUE(IsNoticed([&] { Invalidate(0x0001'2345'0042'0026); }));
  EXPECT_FALSE(IsNoticed([&] { Invalidate(0x0001'2346'0042'0026); })) << "another PASID";
  EXPECT_FALSE(IsNoticed([&] { Invalidate(0x0001'2345'0043'0026); })) << "another domain";
  EXPECT_FALSE(IsNoticed([&] { Invalidate(0x0001'2345'0042'0017); })) << "the PASID entry alone";
  EXPECT_FALSE(IsNoticed([&] { Invalidate(0x11); })) << "the context alone";
}

TEST_F(VtdIommuCachesTest, PagesOfAPasid) {
  EXPECT_TRUE(IsNoticed([&] { Invalidate(0x0001'2345'0042'0036, 0x7f12'3456'7000); }));
  EXPECT_TRUE(IsNoticed([&] { Invalidate(0x0001'2345'0042'0036, 0x7f12'3456'0004); }));
  EXPECT_FALSE(IsNoticed([&] { Invalidate(0x0001'2345'0042'0036, 0x7f12'3456'8000); }));
  EXPECT_FALSE(IsNoticed([&] { Invalidate(0x0001'2345'0042'0036, 0x7f12'3456'6000); }));
  EXPECT_FALSE(IsNoticed([&] { Invalidate(0x0001'2346'0042'0036, 0x7f12'3456'7000); }));
  EXPECT_FALSE(IsNoticed([&] { Invalidate(0x0001'2345'0043'0036, 0x7f12'3456'7000); }));
}

TEST_F(VtdIommuCachesTest, InvalidationsByDomain) {
  EXPECT_TRUE(IsNoticed([&] { Invalidate(0x12); }));
  EXPECT_TRUE(IsNoticed([&] { Invalidate(0x42'0022); }));
  EXPECT_FALSE(IsNoticed([&] { Invalidate(0x43'0022); }));
  EXPECT_TRUE(IsNoticed([&] { Invalidate(0x42'0032, 0x1000); }))
      << "no one knows which addresses of the device lead to that one";
  EXPECT_FALSE(IsNoticed([&] { Invalidate(0x43'0032, kGpa & ~kPageMask); }));
}

TEST_F(VtdIommuCachesTest, PagesOfASecondStageAlone) {
  const auto translate = [&] { return iommu_->translate(WithoutPasid(kGpa)); };
  ExpectTarget(translate(), kGpa + kOffset);
  Put(kSecondLeafAt, 0x10'0001'0003);
  Invalidate(0x43'0032, 0x567'9000);
  Invalidate(0x42'0032, 0x567'8000);
  Invalidate(0x0000'0000'0043'0026);  // a PASID has none of them
  ExpectTarget(translate(), kGpa + kOffset);
  Invalidate(0x43'0032, 0x567'8000);
  ExpectTarget(translate(), 0x10'0001'0abc);
}

TEST_F(VtdIommuCachesTest, LargePagesGoByAnyOfTheirAddresses) {
  const auto translate = [&] { return iommu_->translate(WithoutPasid(0x40'1234)); };
  ExpectTarget(translate(), 0x10'0040'1234);
  EXPECT_EQ(iommu_->cached().pages, 1);
  ExpectTarget(iommu_->translate(WithoutPasid(0x5f'f000)), 0x10'005f'f000);
  EXPECT_EQ(iommu_->cached().pages, 1) << "the same page";
  Put(0x30'2000 + 2 * 8, 0x11'0040'0083);
  Invalidate(0x43'0032, 0x60'0000);
  ExpectTarget(translate(), 0x10'0040'1234);
  Invalidate(0x43'0032, 0x5f'f000);
  ExpectTarget(translate(), 0x11'0040'1234);
}

TEST_F(VtdIommuCachesTest, TwoDevicesOfADomainShareTranslationsOfItsSecondStage) {
  ExpectTarget(iommu_->translate(WithoutPasid(kGpa)), kGpa + kOffset);
  Put(0x2000 + 0x12 * 32, kContext);
  VtdRequest other = WithoutPasid(kGpa);
  other.source = 0x3a92;
  ExpectTarget(iommu_->translate(other), kGpa + kOffset);
  EXPECT_EQ(iommu_->counters().page_hits, 1);
}

TEST_F(VtdIommuCachesTest, APasidEntryIsRememberedUntilItIsInvalidated) {
  ExpectTarget(iommu_->translate(Request(kGva)), kGpa + kOffset);
  PutEntry(kEntryAt, kPassThrough, 0x42, 0);
  const auto is_noticed = [&](uint64_t low) {
    Invalidate(low);
    const auto result = iommu_->translate(Request(kGpa));
    return result && result->address == kGpa;
  };
  EXPECT_FALSE(is_noticed(0x0001'2346'0042'0017));
  EXPECT_FALSE(is_noticed(0x0001'2345'0043'0017));
  EXPECT_FALSE(is_noticed(0x43'0007));
  EXPECT_FALSE(is_noticed(0x11)) << "context";
  EXPECT_FALSE(is_noticed(0x12)) << "IOTLB";
  EXPECT_TRUE(is_noticed(0x0001'2345'0042'0017));
  for (const uint64_t low : {0x42'0007, 0x37}) {
    PutEntry(kEntryAt, kNested, 0x42, 0x40'0000);
    Invalidate(0x37);
    ExpectTarget(iommu_->translate(Request(kGva)), kGpa + kOffset);
    Put(kEntryAt, kPassThrough);
    EXPECT_TRUE(is_noticed(low)) << std::hex << low;
  }
}

TEST_F(VtdIommuCachesTest, AContextEntryIsRememberedUntilItIsInvalidated) {
  const auto is_noticed = [&](uint64_t low) {
    Put(kContextAt, kContext);
    Invalidate(0x11);
    EXPECT_TRUE(Translate());
    Put(kContextAt, kContext & ~uint64_t{8});
    Invalidate(low);
    return !Translate();
  };
  EXPECT_FALSE(is_noticed(0x37));
  EXPECT_FALSE(is_noticed(0x0000'3a92'0000'0031));
  EXPECT_TRUE(is_noticed(0x0000'3a91'0000'0031));
  EXPECT_FALSE(is_noticed(0x0001'3b95'0000'0031)) << "another bus";
  EXPECT_TRUE(is_noticed(0x0001'3a95'0000'0031)) << "of either value of bit 2";
  EXPECT_FALSE(is_noticed(0x0001'3a90'0000'0031));
  EXPECT_TRUE(is_noticed(0x0003'3a96'0000'0031));
  EXPECT_TRUE(is_noticed(0x21));
  EXPECT_TRUE(is_noticed(0x11));
}

TEST_F(VtdIommuCachesTest, AWriteAfterAReadStillSetsDirty) {
  Put(kFirstLeafAt, 0x567'8007);
  EXPECT_TRUE(Translate(Access::kRead));
  EXPECT_EQ(Get(kFirstLeafAt) & 0x60, 0x20);
  EXPECT_TRUE(Translate(Access::kWrite));
  EXPECT_EQ(Get(kFirstLeafAt) & 0x60, 0x60);
  const auto walks = iommu_->counters().walks;
  EXPECT_TRUE(Translate(Access::kReadWrite)) << "both are known now";
  EXPECT_EQ(iommu_->counters().walks, walks);
}

TEST_F(VtdIommuCachesTest, AWriteToADirtyPageNeedsNoWalkAfterARead) {
  Put(kFirstLeafAt, 0x567'8067);
  EXPECT_TRUE(Translate(Access::kRead));
  const auto walks = iommu_->counters().walks;
  EXPECT_TRUE(Translate(Access::kWrite));
  EXPECT_TRUE(Translate(Access::kReadWrite));
  EXPECT_EQ(iommu_->counters().walks, walks);
}

// Without the few last translations in front of the IOTLB: another kind of request, which has its
// answers from there alone.
TEST_F(VtdIommuCachesTest, TheIotlbItselfKnowsWhatIsDirty) {
  const auto ask = [&](Access access) {
    VtdRequest request = Request(kGva, access);
    request.kind = VtdRequest::Kind::kTranslation;
    const auto walks = iommu_->counters().walks;
    EXPECT_TRUE(iommu_->translate(request));
    return iommu_->counters().walks - walks;
  };
  Put(kFirstLeafAt, 0x567'8007);
  EXPECT_EQ(ask(Access::kRead), 1);
  EXPECT_EQ(ask(Access::kRead), 0);
  EXPECT_EQ(ask(Access::kWrite), 1) << "it has to be marked";
  EXPECT_EQ(ask(Access::kWrite), 0);
  EXPECT_EQ(ask(Access::kRead), 0) << "what was written is accessed";
  Put(kFirstLeafAt, 0x567'8047);
  Invalidate(0x0001'2345'0042'0026);
  EXPECT_EQ(ask(Access::kRead), 1);
  EXPECT_EQ(Get(kFirstLeafAt) & 0x60, 0x60);
  EXPECT_EQ(ask(Access::kReadWrite), 0);
}

// Of two stages, both have to be dirty; a stage that keeps no such flags is as good as that.
TEST_F(VtdIommuCachesTest, ADirtyFlagOfEitherStageThatIsMissingIsSet) {
  Put(kFirstLeafAt, 0x567'8067);
  PutEntry(kEntryAt, kNested | 1 << 9, 0x180'0042, 0x40'0000);
  Invalidate(0x37);
  EXPECT_TRUE(Translate(Access::kRead));
  EXPECT_EQ(Get(kSecondLeafAt) & 0x300, 0x100);
  const auto walks = iommu_->counters().walks;
  EXPECT_TRUE(Translate(Access::kWrite));
  EXPECT_EQ(Get(kSecondLeafAt) & 0x300, 0x300);
  EXPECT_EQ(iommu_->counters().walks, walks + 1);
  Invalidate(0x0001'2345'0042'0026);
  EXPECT_TRUE(Translate(Access::kRead));
  EXPECT_TRUE(Translate(Access::kWrite));
  EXPECT_EQ(iommu_->counters().walks, walks + 2);
}

TEST_F(VtdIommuCachesTest, AHitAllowsNoMoreThanTheTables) {
  Put(kFirstLeafAt, 0x567'8065);
  EXPECT_TRUE(Translate(Access::kRead));
  ExpectRefused(Translate(Access::kWrite), 0x85);
  EXPECT_EQ(Translate(Access::kRead)->rights, kMayRead);
}

TEST_F(VtdIommuCachesTest, UsersDoNotHitWhatASupervisorFound) {
  Put(kEntryAt + 16, 0x40'0001);
  Put(kFirstLeafAt, 0x567'8063);
  EXPECT_TRUE(Translate(Wanted(kMayRead, true)));
  ExpectRefused(Translate(), 0x81);
}

TEST_F(VtdIommuCachesTest, ToAskLeavesNoTraces) {
  Put(kFirstLeafAt, 0x567'8007);
  EXPECT_TRUE(Translate(Wanted()));
  EXPECT_EQ(Get(kFirstLeafAt), 0x567'8007);
  EXPECT_EQ(iommu_->cached().pages, 0);
}

TEST_F(VtdIommuCachesTest, WhatIsNotThereIsNotRemembered) {
  Put(kFirstLeafAt, 0);
  ExpectRefused(Translate(), 0x71);
  Put(kFirstLeafAt, 0x567'8067);
  ExpectTarget(Translate(), kGpa + kOffset);
}

TEST_F(VtdIommuCachesTest, APageWithInterruptsInItIsNotRememberedAsAWhole) {
  Put(0x30'2000 + 2 * 8, 0xfee0'0083);
  ExpectTarget(iommu_->translate(WithoutPasid(0x50'0000)), 0xfef0'0000);
  ExpectRefused(iommu_->translate(WithoutPasid(0x40'0000)), 0x87);
}

TEST_F(VtdIommuCachesTest, CachesAreBounded) {
  Make({.caches = {.contexts = 4, .pasids = 4, .pages = 8}});
  for (uint64_t page = 0; page < 0x200; ++page) {
    ExpectTarget(iommu_->translate(WithoutPasid(0x40'0000 + BytesIn(page))),
                 0x10'0040'0000 + BytesIn(page));
    Put(0x30'3000 + page * 8, BytesIn(page + 1) | 3);
  }
  for (uint64_t page = 0; page < 0x200; ++page) {
    EXPECT_TRUE(iommu_->translate(WithoutPasid(0x560'0000 + BytesIn(page))));
  }
  EXPECT_EQ(iommu_->cached().pages, 8);
}

TEST_F(VtdIommuCachesTest, ANewRootForgetsEverything) {
  EXPECT_TRUE(Translate());
  iommu_->set_root(kRoot);
  EXPECT_EQ(iommu_->cached().pages, 0);
  EXPECT_EQ(iommu_->cached().pasids, 0);
  EXPECT_EQ(iommu_->cached().contexts, 0);
}

TEST_F(VtdIommuCachesTest, WithoutTranslationAddressesAreWhatTheySay) {
  iommu_->set_translating(false);
  EXPECT_TRUE(object_->is_bypassed());
  EXPECT_EQ(iommu_->translate(WithoutPasid(0x1234)), (VtdTarget{0x1234, 0xdcc, kAllRights}));
  EXPECT_FALSE(Translate()) << "an address of a process is none of the guest";
  EXPECT_EQ(iommu_->faults().status(), 0);
  iommu_->set_translating(true);
  EXPECT_FALSE(object_->is_bypassed());
  EXPECT_TRUE(Translate());
}

using VtdIommuFaultsTest = VtdIommuTest;

TEST_F(VtdIommuFaultsTest, AFaultIsRecordedWithItsReason) {
  Put(kFirstLeafAt, 0);
  ExpectRefused(Translate(Access::kWrite), 0x71);
  EXPECT_EQ(iommu_->faults().words(0), (FaultLog::Words{0x7f12'3456'7000, 0x8123'4571'8000'3a91}));
  EXPECT_EQ(fault_events_, 1);
  iommu_->write_fault_status(~uint32_t{0});
  iommu_->faults().release(0);
  EXPECT_EQ(iommu_->faults().status(), 0);
  ExpectRefused(iommu_->translate(WithoutPasid(0x1000)), 0x79);
  EXPECT_EQ(iommu_->faults().words(1), (FaultLog::Words{0x1000, 0xc000'0079'0000'3a91}));
}

TEST_F(VtdIommuFaultsTest, HiddenFaultsAreNotRecorded) {
  Put(kEntryAt, kNested | 2);
  Put(kFirstLeafAt, 0);
  ExpectRefused(Translate(), 0x71, /*is_hidden=*/true);
  ExpectRefused(Translate(), 0x71, /*is_hidden=*/true);
  EXPECT_EQ(iommu_->faults().status(), 0);
  EXPECT_EQ(iommu_->counters().faults, 2);
}

TEST_F(VtdIommuFaultsTest, ADeviceThatAskedIsToldAndNothingIsRecorded) {
  VtdRequest request = Request(kGva);
  request.kind = VtdRequest::Kind::kTranslation;
  Put(kFirstLeafAt, 0);
  ExpectRefused(iommu_->translate(request), 0x71);
  EXPECT_EQ(iommu_->faults().status(), 0);
  Put(kFirstLeafAt, uint64_t{1} << 51 | 1);
  Put(kEntryAt, 0x30'0049);  // the first stage alone: reserved bits there
  Invalidate(0x37);
  ExpectRefused(iommu_->translate(request), 0x72);
  EXPECT_EQ(iommu_->faults().words(0).high >> 60, 0xd) << "recorded as a translation request";
}

TEST_F(VtdIommuFaultsTest, ADeviceIsToldOfAPasidThatIsNotThereYet) {
  VtdRequest request = Request(kGva);
  request.kind = VtdRequest::Kind::kTranslation;
  Put(kEntryAt, 0);
  ExpectRefused(iommu_->translate(request), 0x59);
  Put(kDirectoryAt, 0);
  ExpectRefused(iommu_->translate(request), 0x51);
  EXPECT_EQ(iommu_->faults().status(), 0);
  ExpectRefused(iommu_->translate(Request(kGva)), 0x51);
  EXPECT_EQ(iommu_->faults().status(), FaultLog::kPending);
}

TEST_F(VtdIommuFaultsTest, AQueueErrorIsInTheStatusAndClearingItGoesOn) {
  Invalidate(0x02);
  EXPECT_EQ(iommu_->faults().status(), FaultLog::kQueueError);
  EXPECT_EQ(fault_events_, 1);
  EXPECT_EQ(iommu_->queue().error(), QueueError::kReserved);
  Put(kQueue, 0x12);
  iommu_->write_fault_status(FaultLog::kOverflow);
  EXPECT_TRUE(iommu_->queue().error()) << "another bit";
  iommu_->write_fault_status(FaultLog::kQueueError);
  iommu_->run_queue();
  EXPECT_EQ(iommu_->faults().status(), 0);
  EXPECT_EQ(iommu_->queue().head(), tail_);
}

TEST_F(VtdIommuFaultsTest, WaitsWriteTheirStatusAndInterrupt) {
  Invalidate(0x0000'0002'0000'0065, kStatus);
  EXPECT_EQ(Get(kStatus), 2);
  EXPECT_EQ(wait_events_, 0);
  EXPECT_FALSE(iommu_->is_wait_complete());
  iommu_->set_wait_masked(false);
  Invalidate(0x15);
  Invalidate(0x15);
  EXPECT_TRUE(iommu_->is_wait_complete());
  EXPECT_EQ(wait_events_, 1) << "the first one has not been seen yet";
  iommu_->clear_wait_complete();
  iommu_->set_wait_masked(true);
  Invalidate(0x15);
  EXPECT_EQ(wait_events_, 1);
  iommu_->set_wait_masked(false);
  EXPECT_EQ(wait_events_, 2);
  iommu_->clear_wait_complete();
  iommu_->set_wait_masked(true);
  Invalidate(0x15);
  iommu_->clear_wait_complete();
  iommu_->set_wait_masked(false);
  EXPECT_EQ(wait_events_, 2) << "seen meanwhile";
}

TEST_F(VtdIommuFaultsTest, AStatusOutsideOfMemoryStopsTheQueue) {
  Invalidate(0x25, 0x7000'0000'0000);
  EXPECT_EQ(iommu_->faults().status(), FaultLog::kQueueError);
}

TEST_F(VtdIommuFaultsTest, InterruptEntriesAreSomebodyElses) {
  Invalidate(0x1234'1800'0014);
  ASSERT_EQ(interrupt_entries_.size(), 1);
  EXPECT_EQ(interrupt_entries_[0].index, 0x1234);
}

}  // namespace
}  // namespace mvgpu::domain
