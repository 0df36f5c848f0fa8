#include "apionly-domain/nested/nested_domain.h"

#include <thread>

#include "apionly-domain/nested/container_target.h"
#include "apionly-domain/nested/zpci_table.h"
#include "tests/apionly-domain/nested/nested_fixture.h"
#include "tests/apionly-domain/nested/zpci_builder.h"

namespace mvgpu::domain {
namespace {

using ::testing::ElementsAre;
using testing::FailsWith;
using ::testing::IsEmpty;
using testing::IsOk;
using testing::RecordingTarget;
using Call = RecordingTarget::Call;
using End = Refreshed::End;

constexpr uint64_t kMiB = 1 << 20;
constexpr uint64_t kGiB = 1 << 30;

// A domain that follows s390 tables.
class NestedDomainTest : public NestedTest {
 protected:
  static constexpr uint64_t kBase = 0x1'0000'0000;  // first address of the aperture
  static constexpr uint64_t kBuffer = 0x1'2345'6000;

  void SetUp() override {
    NestedTest::SetUp();
    walker_ = std::make_unique<ZpciTable>(tables_.get());
    Start();
  }
  void Start(NestedDomain::OnFault on_fault = NestedDomain::OnFault::kStop) {
    Nest(walker_.get(), testing::ZpciBuilder::kIota, RangeAt(kBase, uint64_t{16} << 30), on_fault);
  }
  Refreshed Refresh(uint64_t iova, uint64_t size, uint64_t max_steps = UINT64_MAX) {
    return nested_->refresh(RangeAt(iova, size), max_steps);
  }
  void ExpectMapped(uint64_t iova, uint64_t frame, Access access = Access::kReadWrite) {
    const auto it = target_->pages.find(iova);
    ASSERT_NE(it, target_->pages.end()) << std::hex << iova;
    EXPECT_EQ(it->second, (RecordingTarget::Page{frame, access})) << std::hex << iova;
    EXPECT_EQ(nested_->translate(Iova(iova + 5), Access::kRead), GuestPhys(frame + 5));
  }
  void ExpectNothingThere(uint64_t iova) {
    EXPECT_FALSE(target_->pages.contains(iova)) << std::hex << iova;
    EXPECT_FALSE(nested_->translate(Iova(iova), Access::kRead).has_value());
  }

  std::unique_ptr<ZpciTable> walker_;
  testing::ZpciBuilder guest_{&ram_};
};

TEST_F(NestedDomainTest, NothingIsMappedBeforeARefresh) {
  guest_.map(kBuffer, kFrames);
  EXPECT_THAT(target_->calls, IsEmpty());
  EXPECT_EQ(PinnedPages(), 0);
}

TEST_F(NestedDomainTest, VectorDiffOfThreePages) {
  guest_.map(kBuffer, 0xabc'd000);
  guest_.map(kBuffer + 0x1000, 0xabc'e000, /*read_only=*/true);
  guest_.unmap(kBuffer + 0x2000);
  const Refreshed first = Refresh(kBuffer, 0x3000);
  EXPECT_EQ(first.end, End::kDone);
  EXPECT_EQ(first.mapped_pages, 2);
  EXPECT_EQ(first.unmapped_pages, 0);
  ExpectMapped(kBuffer, 0xabc'd000);
  ExpectMapped(kBuffer + 0x1000, 0xabc'e000, Access::kRead);
  ExpectNothingThere(kBuffer + 0x2000);

  guest_.unmap(kBuffer);
  guest_.unmap(kBuffer + 0x1000);
  target_->take_calls();
  EXPECT_EQ(Refresh(kBuffer, 0x3000).unmapped_pages, 2);
  EXPECT_THAT(target_->calls, ElementsAre(Call{false, kBuffer, 0x2000}));
  EXPECT_EQ(PinnedPages(), 0);
}

TEST_F(NestedDomainTest, ARefreshOfWhatDidNotChangeCallsNobody) {
  for (uint64_t i = 0; i < 300; ++i) guest_.map(kBuffer + i * kPageSize, kFrames + i * kPageSize);
  Refresh(kBuffer, 300 * kPageSize);
  target_->take_calls();
  const auto before = domain_->counters();
  const Refreshed again = nested_->refresh_all();
  EXPECT_EQ(again.end, End::kDone);
  EXPECT_EQ(again.mapped_pages + again.unmapped_pages, 0);
  EXPECT_THAT(target_->calls, IsEmpty());
  EXPECT_EQ(domain_->counters().pin_calls, before.pin_calls);
}

TEST_F(NestedDomainTest, ContiguousPagesAreMappedAndPinnedAsRuns) {
  const uint64_t start = kBase + kMiB;  // of a page table, and of a chunk's half
  for (uint64_t i = 0; i < 256; ++i) guest_.map(start + i * kPageSize, kFrames + i * kPageSize);
  Refresh(start, kMiB);
  EXPECT_THAT(target_->calls, ElementsAre(Call{true, start, kMiB}));
  EXPECT_EQ(domain_->counters().pin_calls, 1);
  EXPECT_EQ(PinnedPages(), 256);
}

TEST_F(NestedDomainTest, OnlyPagesThatChangedAreTouched) {
  for (uint64_t i = 0; i < 16; ++i) guest_.map(kBuffer + i * kPageSize, kFrames + i * kPageSize);
  Refresh(kBuffer, 16 * kPageSize);
  target_->take_calls();
  guest_.map(kBuffer + 5 * kPageSize, kFrames + kMiB);
  const Refreshed changed = Refresh(kBuffer, 16 * kPageSize);
  EXPECT_EQ(changed.mapped_pages, 1);
  EXPECT_EQ(changed.unmapped_pages, 1);
  const uint64_t at = kBuffer + 5 * kPageSize;
  EXPECT_THAT(target_->calls, ElementsAre(Call{false, at, kPageSize}, Call{true, at, kPageSize}));
  ExpectMapped(at, kFrames + kMiB);
}

TEST_F(NestedDomainTest, APageThatBecomesProtectedLosesTheRightToWrite) {
  guest_.map(kBuffer, kFrames);
  Refresh(kBuffer, kPageSize);
  guest_.map(kBuffer, kFrames, /*read_only=*/true);
  Refresh(kBuffer, kPageSize);
  ExpectMapped(kBuffer, kFrames, Access::kRead);
  EXPECT_EQ(nested_->translate(Iova(kBuffer), Access::kWrite), tl::unexpected(FaultCode::kNoWrite));
  EXPECT_THAT(Pin(kFrames, kPageSize, Access::kRead), IsOk());
  EXPECT_EQ(PinnedPages(), 1);
}

TEST_F(NestedDomainTest, AFrameAtTwoIovasIsPinnedForEach) {
  guest_.map(kBuffer, kFrames);
  guest_.map(kBuffer + kMiB, kFrames);
  Refresh(kBuffer, 2 * kMiB);
  EXPECT_EQ(PinnedPages(), 2);
  EXPECT_EQ(PagesPinnedOnce(), 1);
  guest_.unmap(kBuffer);
  Refresh(kBuffer, kPageSize);
  ExpectMapped(kBuffer + kMiB, kFrames);
  EXPECT_EQ(PagesPinnedOnce(), 1);
}

// QEMU steps by the span of a hole from wherever the range starts, and so over pages of the next
// table.
TEST_F(NestedDomainTest, AHoleThatTheRangeStartsInDoesNotHideWhatComesBehindIt) {
  guest_.map(kBase + 2 * kGiB, kFrames);  // the region entry before is empty
  EXPECT_EQ(Refresh(kBase + 0x1000, 3 * kGiB).mapped_pages, 1);
  guest_.map(kBase + 2 * kGiB + 5 * kMiB, kFrames + kPageSize);  // segment entries before are empty
  EXPECT_EQ(Refresh(kBase + 2 * kGiB + 4 * kMiB + 0x3000, 2 * kMiB).mapped_pages, 1);
  ExpectMapped(kBase + 2 * kGiB, kFrames);
  ExpectMapped(kBase + 2 * kGiB + 5 * kMiB, kFrames + kPageSize);
}

// The KVM series goes on with the next table without looking at the rest of the range.
TEST_F(NestedDomainTest, AMissingTableDoesNotEndTheRefreshOfWhatComesBehindIt) {
  guest_.map(kBuffer, kFrames);
  guest_.map(kBuffer + 3 * kMiB, kFrames + kPageSize);
  EXPECT_EQ(Refresh(kBuffer, 4 * kMiB).mapped_pages, 2);
}

// The KVM series leaves what was mapped below a removed table pinned.
TEST_F(NestedDomainTest, ARemovedTableUnmapsEverythingBelowIt) {
  for (const uint64_t at : {kBase, kBase + kMiB, kBase + 3 * kGiB}) guest_.map(at, kFrames);
  nested_->refresh_all();
  EXPECT_EQ(PinnedPages(), 3);
  guest_.put(guest_.segment_entry(kBase), 0x20);
  Refresh(kBase, kGiB);
  ExpectNothingThere(kBase);
  EXPECT_EQ(PinnedPages(), 2);
  guest_.put(guest_.region_entry(kBase), 0x20);
  guest_.put(guest_.region_entry(kBase + 3 * kGiB), 0x20);
  Refresh(kBase, 4 * kGiB);
  EXPECT_EQ(PinnedPages(), 0);
}

// The KVM series keeps using the page table that it has in its cache.
TEST_F(NestedDomainTest, ATableThatIsReplacedIsReadAnew) {
  guest_.map(kBuffer, kFrames);
  Refresh(kBuffer, kPageSize);
  const uint64_t other = guest_.AllocatePageTable();
  guest_.put(other + (kBuffer >> 12) % 256 * 8, kFrames + 7 * kPageSize);
  guest_.put(guest_.segment_entry(kBuffer), other);
  Refresh(kBuffer, kPageSize);
  ExpectMapped(kBuffer, kFrames + 7 * kPageSize);
}

// QEMU does not give the credit of a replaced entry back.
TEST_F(NestedDomainTest, AReplacedPageNeedsNoSecondCredit) {
  LimitCredits(1);
  Start();
  for (uint64_t i = 0; i < 5; ++i) {
    guest_.map(kBuffer, kFrames + i * kPageSize);
    EXPECT_EQ(Refresh(kBuffer, kPageSize).end, End::kDone) << i;
    EXPECT_EQ(credits_->available(), 0);
  }
}

TEST_F(NestedDomainTest, PagesBeyondTheCreditsAreReportedAndTheRestIsDone) {
  LimitCredits(4);
  Start();
  for (uint64_t i = 0; i < 3; ++i) guest_.map(kBuffer + i * kPageSize, kFrames + i * kPageSize);
  Refresh(kBuffer, 3 * kPageSize);
  for (uint64_t i = 3; i < 6; ++i) guest_.map(kBuffer + i * kPageSize, kFrames + i * kPageSize);
  const Refreshed refreshed = Refresh(kBuffer, 6 * kPageSize);
  EXPECT_EQ(refreshed.end, End::kNoCredits);
  EXPECT_EQ(refreshed.next, Iova(kBuffer + 4 * kPageSize));
  EXPECT_EQ(refreshed.mapped_pages, 1);
  EXPECT_EQ(PinnedPages(), 4);
}

TEST_F(NestedDomainTest, CreditsThatComeBackLaterInTheRangeAreUsedForItsBeginning) {
  LimitCredits(2);
  Start();
  guest_.map(kBuffer + 2 * kMiB, kFrames);
  guest_.map(kBuffer + 3 * kMiB, kFrames + kPageSize);
  Refresh(kBuffer, 4 * kMiB);
  guest_.unmap(kBuffer + 2 * kMiB);
  guest_.unmap(kBuffer + 3 * kMiB);
  guest_.map(kBuffer, kFrames + 2 * kPageSize);
  guest_.map(kBuffer + kPageSize, kFrames + 3 * kPageSize);
  EXPECT_EQ(Refresh(kBuffer, 4 * kMiB).end, End::kDone);
  ExpectMapped(kBuffer, kFrames + 2 * kPageSize);
  ExpectMapped(kBuffer + kPageSize, kFrames + 3 * kPageSize);
}

TEST_F(NestedDomainTest, DomainsOfAVmShareTheirCredits) {
  LimitCredits(3);
  Start();
  RecordingTarget other_target(domain_.get());
  NestedDomain other({"other", testing::ZpciBuilder::kIota, RangeAt(kBase, kGiB)},
                     {domain_.get(), walker_.get(), &other_target, credits_.get()});
  guest_.map(kBuffer, kFrames);
  guest_.map(kBuffer + kPageSize, kFrames + kPageSize);
  EXPECT_EQ(nested_->refresh_all().end, End::kDone);
  EXPECT_EQ(other.refresh_all().end, End::kNoCredits);
  nested_->clear();
  EXPECT_EQ(other.refresh_all().end, End::kDone);
}

TEST_F(NestedDomainTest, ARefreshThatRunsOutOfStepsGoesOnWhereItStopped) {
  for (uint64_t i = 0; i < 8; ++i) guest_.map(kBase + i * kMiB, kFrames + i * kPageSize);
  const Refreshed part = Refresh(kBase, 8 * kMiB, 3);
  EXPECT_EQ(part.end, End::kStepLimit);
  EXPECT_EQ(part.steps, 3);
  EXPECT_EQ(part.next, Iova(kBase + 3 * kMiB));
  EXPECT_EQ(PinnedPages(), 3);
  EXPECT_EQ(
      nested_->refresh(IovaRange::FromFirstAndLast(part.next, Iova(kBase + 8 * kMiB - 1))).end,
      End::kDone);
  EXPECT_EQ(PinnedPages(), 8);
}

TEST_F(NestedDomainTest, AWrongTableStopsTheRefreshAndKeepsWhatWasDone) {
  guest_.map(kBuffer, kFrames);
  guest_.map(kBuffer + kPageSize, kFrames + kPageSize);
  guest_.map(kBuffer + 2 * kPageSize, kFrames + 2 * kPageSize);
  Refresh(kBuffer, 3 * kPageSize);
  guest_.map(kBuffer, kFrames + 9 * kPageSize);
  guest_.put(guest_.page_entry(kBuffer + kPageSize), 0);
  const Refreshed refreshed = Refresh(kBuffer, 3 * kPageSize);
  EXPECT_EQ(refreshed.end, End::kFault);
  EXPECT_EQ(refreshed.fault->code, FaultCode::kNullEntry);
  EXPECT_EQ(refreshed.next, Iova(kBuffer + kPageSize));
  ExpectMapped(kBuffer, kFrames + 9 * kPageSize);
  ExpectNothingThere(kBuffer + kPageSize);  // the tables do not say so any more
  ExpectMapped(kBuffer + 2 * kPageSize, kFrames + 2 * kPageSize);
}

TEST_F(NestedDomainTest, AWrongTableIsLeftOutWhereTheArchitectureWantsThat) {
  Start(NestedDomain::OnFault::kSkip);
  guest_.map(kBuffer, kFrames);
  guest_.put(guest_.page_entry(kBuffer + kPageSize), 0);
  guest_.map(kBuffer + 2 * kPageSize, kFrames + kPageSize);
  guest_.put(guest_.segment_entry(kBuffer + kMiB), 0);
  guest_.map(kBuffer + 2 * kMiB, kFrames + 2 * kPageSize);
  const Refreshed refreshed = Refresh(kBuffer, 3 * kMiB);
  EXPECT_EQ(refreshed.end, End::kDone);
  EXPECT_EQ(refreshed.mapped_pages, 3);
  EXPECT_EQ(refreshed.left_out_pages, 1 + 256);
  EXPECT_EQ(refreshed.fault->device_address, kBuffer + kPageSize);
}

TEST_F(NestedDomainTest, AFrameOutsideOfGuestMemoryEndsTheRunBeforeIt) {
  const uint64_t last = kFrames + kFramesSize - kPageSize;
  for (uint64_t i = 0; i < 4; ++i) guest_.map(kBuffer + i * kPageSize, last + i * kPageSize);
  const Refreshed refreshed = Refresh(kBuffer, 4 * kPageSize);
  EXPECT_EQ(refreshed.end, End::kNotMappable);
  EXPECT_EQ(refreshed.error->code(), ErrorCode::kNotMapped);
  EXPECT_EQ(refreshed.next, Iova(kBuffer + kPageSize));
  ExpectMapped(kBuffer, last);
  EXPECT_EQ(PinnedPages(), 1);
  EXPECT_EQ(credits_->available(), MapCredits::kVfioDefault - 1);
}

TEST_F(NestedDomainTest, FramesAtTheEndOfTheAddressSpaceDoNotRunOnAtItsBeginning) {
  Map(0xffff'ffff'ffff'f000, 0, kPageSize);
  guest_.map(kBuffer, 0xffff'ffff'ffff'f000);
  guest_.put(guest_.page_entry(kBuffer + kPageSize), 0x200);  // frame 0, read-only
  guest_.map(kBuffer, 0xffff'ffff'ffff'f000, /*read_only=*/true);
  EXPECT_EQ(Refresh(kBuffer, 2 * kPageSize).end, End::kDone);
  ExpectMapped(kBuffer + kPageSize, 0, Access::kRead);
}

TEST_F(NestedDomainTest, ATargetThatRefusesLeavesNothingPinned) {
  for (uint64_t i = 0; i < 4; ++i) guest_.map(kBuffer + i * kPageSize, kFrames + i * kPageSize);
  target_->fails_at = kBuffer + 2 * kPageSize;
  const Refreshed refreshed = Refresh(kBuffer, 4 * kPageSize);
  EXPECT_EQ(refreshed.end, End::kNotMappable);
  EXPECT_EQ(refreshed.next, Iova(kBuffer + 2 * kPageSize));
  EXPECT_EQ(PinnedPages(), 2);
  target_->fails_at.reset();
  EXPECT_EQ(nested_->refresh_all().end, End::kDone);
  EXPECT_EQ(PinnedPages(), 4);
}

TEST_F(NestedDomainTest, ABackEndThatRefusesLeavesNothingMapped) {
  Start();
  guest_.map(kBuffer, kFrames);
  pins_->fail_at_call = 1;
  const Refreshed refreshed = Refresh(kBuffer, kPageSize);
  EXPECT_EQ(refreshed.end, End::kNotMappable);
  ExpectNothingThere(kBuffer);
  EXPECT_EQ(credits_->available(), MapCredits::kVfioDefault);
}

TEST_F(NestedDomainTest, MemoryThatTheVmmTakesAwayIsUnmappedFirst) {
  guest_.map(kBuffer, kFrames);
  guest_.map(kBuffer + kMiB, kFrames);
  guest_.map(kBuffer + kPageSize, 0x1000);  // elsewhere: stays
  nested_->refresh_all();
  EXPECT_THAT(container_.unmap(Iova(kFrames), kFramesSize), IsOk());
  ExpectNothingThere(kBuffer);
  ExpectNothingThere(kBuffer + kMiB);
  ExpectMapped(kBuffer + kPageSize, 0x1000);
  EXPECT_EQ(nested_->counters().revoked_pages, 2);
  EXPECT_EQ(PinnedPages(), 1);
}

TEST_F(NestedDomainTest, MemoryThatTheVmmPutsBackIsMappedByTheNextRefresh) {
  guest_.map(kBuffer, kFrames);
  nested_->refresh_all();
  EXPECT_THAT(container_.unmap(Iova(kFrames), kFramesSize), IsOk());
  EXPECT_EQ(nested_->refresh_all().end, End::kNotMappable);
  Map(kFrames, kTablesSize, kFramesSize);
  EXPECT_EQ(nested_->refresh_all().end, End::kDone);
  ExpectMapped(kBuffer, kFrames);
}

TEST_F(NestedDomainTest, NothingOutsideOfTheApertureIsMapped) {
  guest_.map(kBase - kPageSize, kFrames);
  guest_.map(kBase, kFrames + kPageSize);
  EXPECT_EQ(nested_->refresh(RangeAt(0, 2 * kBase)).mapped_pages, 1);
  ExpectNothingThere(kBase - kPageSize);
}

TEST_F(NestedDomainTest, TeardownLeavesNoPinAndNoMapping) {
  for (uint64_t i = 0; i < 500; ++i) guest_.map(kBase + i * 37 * kPageSize, kFrames);
  nested_->refresh_all();
  EXPECT_EQ(PinnedPages(), 500);
  nested_.reset();
  EXPECT_EQ(PinnedPages(), 0);
  EXPECT_TRUE(target_->pages.empty());
  EXPECT_EQ(credits_->available(), MapCredits::kVfioDefault);
}

// A container with an api-only domain, so that what is mapped can be read and written.
TEST_F(NestedDomainTest, AContainerAsTargetReachesTheGuestsMemory) {
  Container device;
  const auto device_domain = AddDomain(device, "device");
  ContainerTarget target(domain_.get(), &device);
  {
    NestedDomain nested({"nested", testing::ZpciBuilder::kIota, RangeAt(kBase, kGiB)},
                        {domain_.get(), walker_.get(), &target, credits_.get()});
    guest_.map(kBuffer, kFrames);
    guest_.map(kBuffer + kPageSize, kFrames + 0x5000, /*read_only=*/true);
    ASSERT_EQ(nested.refresh_all().end, End::kDone);
    ram_.put<uint64_t>(kTablesSize + 0x5008, 0x1122'3344'5566'7788);
    uint64_t word = 0;
    EXPECT_THAT(device_domain->read(Iova(kBuffer + kPageSize + 8),
                                    std::as_writable_bytes(std::span(&word, 1))),
                IsOk());
    EXPECT_EQ(word, 0x1122'3344'5566'7788);
    const auto bytes = std::as_bytes(std::span(&word, 1));
    EXPECT_THAT(device_domain->write(Iova(kBuffer + kPageSize), bytes),
                FailsWith(ErrorCode::kPermission));
    EXPECT_THAT(device_domain->write(Iova(kBuffer + 16), bytes), IsOk());
    EXPECT_EQ(ram_.get<uint64_t>(kTablesSize + 16), word);
    guest_.unmap(kBuffer);
    nested.refresh_all();
    EXPECT_THAT(device_domain->write(Iova(kBuffer), bytes), FailsWith(ErrorCode::kNotMapped));
  }
  EXPECT_EQ(device.totals().mappings, 0);
  EXPECT_THAT(device.detach(device_domain.get()), IsOk());
}

// Guest, VMM and two refreshers at once; then everything is as the tables say.
TEST_F(NestedDomainTest, RefreshesAndUnmapsAtOnceLeaveNothingBehind) {
  constexpr int kRounds = 200;
  for (uint64_t i = 0; i < 64; ++i) guest_.map(kBuffer + i * kPageSize, kFrames + i * kPageSize);
  const auto refresh = [&] {
    for (int i = 0; i < kRounds; ++i) Refresh(kBuffer, 64 * kPageSize);
  };
  std::thread first(refresh);
  std::thread second(refresh);
  for (int i = 0; i < kRounds; ++i) {
    EXPECT_THAT(container_.unmap(Iova(kFrames), kFramesSize), IsOk());
    Map(kFrames, kTablesSize, kFramesSize);
  }
  first.join();
  second.join();
  EXPECT_EQ(Refresh(kBuffer, 64 * kPageSize).end, End::kDone);
  EXPECT_EQ(PinnedPages(), 64);
  for (uint64_t i = 0; i < 64; ++i) ExpectMapped(kBuffer + i * kPageSize, kFrames + i * kPageSize);
}

}  // namespace
}  // namespace mvgpu::domain
