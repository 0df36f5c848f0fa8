#include "apionly-domain/faults/faulting_domain.h"

#include <fcntl.h>

#include <thread>

#include "apionly-domain/assigned/software_iommu.h"
#include "tests/apionly-domain/faults/faulting_fixture.h"

namespace mvgpu::domain {
namespace {

using testing::CheckedTarget;
using testing::FailsWith;
using testing::IsOk;

TEST_F(FaultingTest, NothingIsPinnedWhenTheVmmMaps) {
  Map(0, 0, 0x10'0000);
  EXPECT_EQ(domain_->counters().pinned_pages, 0u);
  EXPECT_TRUE(Shown().empty());
}

TEST_F(FaultingTest, AFaultPinsAndMapsItsPage) {
  Map(0x10'0000, 0x4000, 0x10'0000);
  const auto resolved = At(0x105);
  ASSERT_THAT(resolved, IsOk());
  EXPECT_EQ(resolved->outcome, Outcome::kMapped);
  EXPECT_EQ(resolved->pages, 1u);
  std::byte* host = ApiOnlyDomain::Translator(*domain_).translate(Iova(0x10'5000), Access::kRead);
  EXPECT_EQ(target_->pages(),
            (std::map<uint64_t, CheckedTarget::Page>{{0x105, {host, Access::kReadWrite}}}));
  EXPECT_TRUE(faulting_->is_mapped(Iova(0x10'5fff)));
  EXPECT_FALSE(faulting_->is_mapped(Iova(0x10'6000)));
  EXPECT_EQ(OutcomeAt(0x105), Outcome::kThere);
  EXPECT_EQ(target_->map_calls, 1u);
  ExpectConsistent();
}

TEST_F(FaultingTest, RightsAreThoseOfTheMapping) {
  Map(0, 0, 0x1'0000, Access::kRead);
  EXPECT_THAT(At(3, Access::kWrite), FailsWith(ErrorCode::kPermission));
  EXPECT_THAT(At(3), FailsWith(ErrorCode::kPermission));
  EXPECT_THAT(At(3, Access::kRead), IsOk());
  EXPECT_EQ(target_->pages().at(3).access, Access::kRead);
  EXPECT_EQ(faulting_->counters().failures, 2u);
  Map(0x10'0000, 0x1'0000, 0x1'0000);
  EXPECT_THAT(At(0x100, Access::kRead), IsOk());
  EXPECT_EQ(target_->pages().at(0x100).access, Access::kReadWrite);
  EXPECT_EQ(faulting_->invalidate(Pages(0, 0x200)), 2u);
  ExpectConsistent();
}

TEST_F(FaultingTest, WhatIsNotMappedOrHasNoFileIsAnError) {
  Map(0x1000, 0, 0x1000);
  MapWithoutFile(0x10'0000, 0x1000);
  EXPECT_THAT(At(0), FailsWith(ErrorCode::kNotMapped));
  EXPECT_THAT(At(2), FailsWith(ErrorCode::kNotMapped));
  EXPECT_THAT(At(UINT64_MAX >> 12), FailsWith(ErrorCode::kNotMapped));
  EXPECT_THAT(At(0x100), FailsWith(ErrorCode::kNotReachable));
  EXPECT_TRUE(Shown().empty());
}

TEST_F(FaultingTest, PagesAroundAFaultComeAlongInAnAlignedWindow) {
  Fault({.around_pages = 16});
  Map(0, 0, 0x10'0000);
  EXPECT_EQ(At(0x25)->pages, 16u);
  EXPECT_EQ(Shown(), Numbers(0x20, 16));
  EXPECT_EQ(target_->map_calls, 1u);
  EXPECT_EQ(OutcomeAt(0x2f), Outcome::kThere);
  EXPECT_EQ(OutcomeAt(0x30), Outcome::kMapped);
  ExpectConsistent();
}

TEST_F(FaultingTest, TheWindowEndsWithTheMapping) {
  Fault({.around_pages = 16});
  Map(BytesIn(0x22), 0, BytesIn(3));
  Map(BytesIn(0x25), BytesIn(0x40), BytesIn(1), Access::kRead);
  EXPECT_EQ(At(0x23)->pages, 3u);
  EXPECT_EQ(Shown(), Numbers(0x22, 3));
  EXPECT_EQ(At(0x25, Access::kRead)->pages, 1u);
  ExpectConsistent();
}

TEST_F(FaultingTest, PagesThatAreThereAreNotMappedAgain) {
  Fault({.around_pages = 8});
  Map(0, 0, 0x10'0000);
  EXPECT_EQ(At(3)->pages, 8u);
  EXPECT_EQ(faulting_->invalidate(Pages(1, 2)), 2u);
  EXPECT_EQ(faulting_->invalidate(Pages(5, 1)), 1u);
  EXPECT_EQ(At(2)->pages, 2u);
  EXPECT_EQ(At(5)->pages, 1u);
  EXPECT_EQ(Shown(), Numbers(0, 8));
  ExpectConsistent();
}

TEST_F(FaultingTest, ANeighbourThatCannotBeMappedDoesNotConcernTheFault) {
  Fault({.around_pages = 4});
  Map(0, 0, 0x10'0000);
  target_->fails_at = 6;
  EXPECT_EQ(At(5)->pages, 1u);
  EXPECT_EQ(Shown(), Numbers(5, 1));
  EXPECT_THAT(At(6), FailsWith(ErrorCode::kSystem));
  ExpectConsistent();
  target_->fails_at.reset();
  EXPECT_THAT(At(6), IsOk());
  ExpectConsistent();
}

TEST_F(FaultingTest, AMappingThatTheIommuLostIsMadeAnew) {
  Map(0, 0, 0x10'0000);
  EXPECT_EQ(OutcomeAt(5), Outcome::kMapped);
  target_->lost.insert(5);
  EXPECT_EQ(OutcomeAt(5), Outcome::kMapped);
  EXPECT_EQ(OutcomeAt(5), Outcome::kThere);
  ExpectConsistent();
}

TEST_F(FaultingTest, MemoryThatIsGivenBackIsUnmappedAndUnpinned) {
  Fault({.around_pages = 4});
  Map(0, 0, 0x40'0000);
  for (uint64_t page = 0; page < 0x400; page += 4) ASSERT_EQ(OutcomeAt(page), Outcome::kMapped);
  // Bytes, not whole pages, over the end of a block.
  EXPECT_EQ(faulting_->invalidate(testing::MakeRange(BytesIn(0x1f0) + 5, BytesIn(0x20))), 0x21u);
  std::set<uint64_t> left = Numbers(0, 0x1f0);
  left.merge(Numbers(0x211, 0x400 - 0x211));
  EXPECT_EQ(Shown(), left);
  ExpectConsistent();
  EXPECT_EQ(faulting_->counters().invalidated_pages, 0x21u);
  EXPECT_EQ(faulting_->invalidate(testing::MakeRange(BytesIn(0x1f0), BytesIn(0x20))), 0u);
}

TEST_F(FaultingTest, WhileMemoryIsGivenBackFaultsThereAreToBeRepeated) {
  Fault({.around_pages = 4});
  Map(0, 0, 0x40'0000);
  ASSERT_EQ(OutcomeAt(8), Outcome::kMapped);
  {
    const auto going = faulting_->begin_invalidate(Pages(10, 4));
    EXPECT_EQ(going.pages(), 2u);
    EXPECT_EQ(OutcomeAt(10), Outcome::kRetry);
    EXPECT_EQ(OutcomeAt(13), Outcome::kRetry);
    EXPECT_EQ(At(14)->pages, 1u);  // and neighbours do not come along
    EXPECT_EQ(OutcomeAt(9), Outcome::kThere);
    const auto again = faulting_->begin_invalidate(Pages(10, 4));
    EXPECT_EQ(again.pages(), 0u);
  }
  EXPECT_EQ(Shown(), (std::set<uint64_t>{8, 9, 14}));
  EXPECT_EQ(OutcomeAt(10), Outcome::kMapped);
  EXPECT_EQ(faulting_->counters().retries, 2u);
  ExpectConsistent();
}

// Pages of one block that are mapped for reading and for writing, in turns and with gaps.
TEST_F(FaultingTest, PagesOfBothKindsAreReleasedAsTheyWerePinned) {
  for (uint64_t page = 0; page < 12; page += 2) {
    Map(BytesIn(page), BytesIn(page), BytesIn(2),
        page % 4 == 0 ? Access::kRead : Access::kReadWrite);
  }
  for (const uint64_t page : {0, 1, 2, 3, 5, 6, 7, 8, 10}) {
    ASSERT_THAT(At(page, Access::kRead), IsOk());
  }
  EXPECT_EQ(faulting_->invalidate(Pages(1, 9)), 7u);
  EXPECT_EQ(Shown(), (std::set<uint64_t>{0, 10}));
  ExpectConsistent();
  EXPECT_EQ(pins_->pages.size(), 2u);
}

TEST_F(FaultingTest, WhereTheDomainHasNoPinsLeftPagesOfOursMakeRoom) {
  Restart({.pin_limit_pages = 6}, {.around_pages = 4});
  Map(0, 0, 0x40'0000);
  ASSERT_EQ(At(0)->pages, 4u);
  ASSERT_EQ(At(4)->pages, 1u);  // four do not fit, and neighbours are not worth dropping any for
  ASSERT_EQ(At(8)->pages, 1u);
  ASSERT_EQ(At(12)->pages, 1u);
  EXPECT_EQ(Shown().size(), 6u);
  ExpectConsistent();
}

TEST_F(FaultingTest, WhereOthersHaveAllPinsTheFaultFails) {
  Restart({.pin_limit_pages = 2}, {});
  Map(0, 0, 0x40'0000);
  owner_.held.emplace(*Pin(0, BytesIn(2)));
  EXPECT_THAT(At(5), FailsWith(ErrorCode::kLimit));
  EXPECT_EQ(OutcomeAt(1), Outcome::kMapped);  // pinned already: no page more
  EXPECT_EQ(faulting_->counters().failures, 1u);
}

TEST_F(FaultingTest, WhatTheVmmTakesAwayGoes) {
  Fault({.around_pages = 8});
  Map(0, 0, 0x10'0000);
  Map(0x10'0000, 0x10'0000, 0x10'0000);
  ASSERT_EQ(OutcomeAt(0xff), Outcome::kMapped);
  ASSERT_EQ(OutcomeAt(0x100), Outcome::kMapped);
  ASSERT_THAT(container_.unmap(Iova(0x10'0000), 0x10'0000), IsOk());
  EXPECT_EQ(Shown(), Numbers(0xf8, 8));
  EXPECT_EQ(faulting_->counters().revoked_pages, 8u);
  EXPECT_THAT(At(0x100), FailsWith(ErrorCode::kNotMapped));
  // Something else there: other memory, other rights.
  Map(0x10'0000, 0x20'0000, 0x10'0000, Access::kRead);
  EXPECT_THAT(At(0x100), FailsWith(ErrorCode::kPermission));
  EXPECT_THAT(At(0x100, Access::kRead), IsOk());
  std::byte* host = ApiOnlyDomain::Translator(*domain_).translate(Iova(0x10'0000), Access::kRead);
  EXPECT_EQ(target_->pages().at(0x100), (CheckedTarget::Page{host, Access::kRead}));
  ExpectConsistent();
}

TEST_F(FaultingTest, AMappingIsCut) {
  Map(0, 0, 0x10'0000);
  for (const uint64_t page : {0x0f, 0x10, 0x1f, 0x20}) ASSERT_EQ(OutcomeAt(page), Outcome::kMapped);
  ASSERT_THAT(container_.unmap(Iova(0x1'0000), 0x1'0000, Container::Cut::kSplit), IsOk());
  EXPECT_EQ(Shown(), (std::set<uint64_t>{0x0f, 0x20}));
  EXPECT_THAT(At(0x10), FailsWith(ErrorCode::kNotMapped));
  EXPECT_THAT(At(0x1f), FailsWith(ErrorCode::kNotMapped));
  EXPECT_EQ(OutcomeAt(0x0e), Outcome::kMapped);
  EXPECT_EQ(OutcomeAt(0x21), Outcome::kMapped);
  std::byte* host = ApiOnlyDomain::Translator(*domain_).translate(Iova(0x2'1000), Access::kRead);
  EXPECT_EQ(target_->pages().at(0x21).host, host);
}

TEST_F(FaultingTest, AnUnmapThatIsRefusedLeavesTheMemoryUsable) {
  Map(0, 0, 0x10'0000);
  owner_.held.emplace(*Pin(0, 0x1000));
  owner_.lets_go = false;
  std::optional<Outcome> meanwhile;
  owner_.during_revoke = [&] { meanwhile = OutcomeAt(7); };
  ASSERT_EQ(OutcomeAt(5), Outcome::kMapped);
  EXPECT_THAT(container_.unmap(Iova(0), 0x10'0000), FailsWith(ErrorCode::kBusy));
  EXPECT_EQ(meanwhile, Outcome::kRetry);
  owner_.during_revoke = nullptr;
  EXPECT_EQ(OutcomeAt(5), Outcome::kMapped);
  owner_.held.reset();
  EXPECT_THAT(container_.unmap(Iova(0), 0x10'0000), IsOk());
  EXPECT_TRUE(Shown().empty());
}

TEST_F(FaultingTest, ItMayLeaveAloneAndComeBack) {
  Map(0, 0, 0x10'0000);
  ASSERT_EQ(OutcomeAt(5), Outcome::kMapped);
  ASSERT_THAT(container_.detach(faulting_.get()), IsOk());
  EXPECT_TRUE(Shown().empty());
  EXPECT_EQ(domain_->counters().pinned_pages, 0u);
  EXPECT_THAT(At(5), FailsWith(ErrorCode::kNotMapped));
  ASSERT_THAT(container_.attach(faulting_.get()), IsOk());
  EXPECT_EQ(OutcomeAt(5), Outcome::kMapped);
}

TEST_F(FaultingTest, NothingIsRememberedOfWhatIsNotMapped) {
  Map(0, 0, 0x40'0000);
  EXPECT_THAT(At(0x5000), FailsWith(ErrorCode::kNotMapped));
  EXPECT_EQ(faulting_->counters().blocks, 0u);
  ASSERT_EQ(OutcomeAt(5), Outcome::kMapped);
  ASSERT_EQ(OutcomeAt(0x205), Outcome::kMapped);
  EXPECT_EQ(faulting_->counters().blocks, 2u);
  faulting_->invalidate(Pages(0x205, 1));
  EXPECT_EQ(faulting_->counters().blocks, 1u);
  {
    const auto going = faulting_->begin_invalidate(Pages(0, 0x400));
    EXPECT_EQ(OutcomeAt(7), Outcome::kRetry);
    EXPECT_EQ(faulting_->counters().blocks, 0u);
  }
}

// What is kept of a block without pages is for the next one, and says nothing about its pages.
TEST_F(FaultingTest, BlocksThatAreLeftAndMadeAgainBeginEmpty) {
  for (uint64_t block = 0; block < 8; ++block) {
    Map(BytesIn(block * FaultingDomain::kBlockPages), BytesIn(block * 16), BytesIn(16));
  }
  for (int round = 0; round < 3; ++round) {
    for (uint64_t block = 0; block < 8; ++block) {
      const uint64_t page = block * FaultingDomain::kBlockPages + 7;
      ASSERT_EQ(OutcomeAt(page), Outcome::kMapped);
      EXPECT_EQ(faulting_->counters().blocks, 1u);
      EXPECT_FALSE(faulting_->is_mapped(Iova(BytesIn(page + 1))));
      EXPECT_EQ(faulting_->invalidate(Pages(page, 1)), 1u);
      EXPECT_EQ(faulting_->counters().blocks, 0u);
      EXPECT_FALSE(faulting_->is_mapped(Iova(BytesIn(page))));
    }
  }
  for (uint64_t block = 0; block < 8; ++block) {
    ASSERT_EQ(OutcomeAt(block * FaultingDomain::kBlockPages), Outcome::kMapped);
  }
  EXPECT_EQ(faulting_->counters().blocks, 8u);
  ExpectConsistent();
}

// Faults go on while this domain alone leaves: none may come after its part has been looked at.
TEST_F(FaultingTest, NoFaultIsServedWhileTheMappingGoes) {
  Map(0, 0, 0x40'0000);
  ASSERT_EQ(OutcomeAt(0x205), Outcome::kMapped);
  std::optional<Outcome> meanwhile;
  target_->during_unmap = [&](IovaRange) { std::thread([&] { meanwhile = OutcomeAt(5); }).join(); };
  ASSERT_THAT(container_.detach(faulting_.get()), IsOk());
  EXPECT_EQ(meanwhile, Outcome::kRetry);
  target_->during_unmap = nullptr;
  ExpectConsistent();
  ASSERT_THAT(container_.attach(faulting_.get()), IsOk());
}

TEST_F(FaultingTest, PinAndMapAreTimed) {
  Map(0, 0, 0x10'0000);
  ASSERT_EQ(OutcomeAt(5), Outcome::kMapped);
  ASSERT_EQ(OutcomeAt(5), Outcome::kThere);
  EXPECT_EQ(times_.of(FaultStep::kPin).count, 1u);
  EXPECT_EQ(times_.of(FaultStep::kMap).count, 1u);
  EXPECT_GT(times_.of(FaultStep::kPin).total_ns, 0u);
}

// Memory that is punched out of the file stays alive as long as it is pinned, without being the
// guest's: a device that still reached it would read old bytes.
TEST_F(FaultingTest, ADeviceSeesWhatTheGuestSeesAfterMemoryWasPunched) {
  Map(0, 0, 0x10'0000);
  StopFaulting();
  auto owned = std::make_unique<SoftwareIommu>();
  SoftwareIommu& iommu = *owned;
  AssignedSpace space(std::move(owned), {.maps_each_page = true});
  SpaceTarget target(&space);
  FaultingDomain faulting({.around_pages = 4}, {domain_.get(), &target, nullptr});
  ASSERT_THAT(container_.attach(&faulting), IsOk());
  const Iova iova(0x5000);
  EXPECT_EQ(iommu.translate(iova, Access::kRead), nullptr);
  *ram_.at(0x5000) = std::byte{42};
  ASSERT_THAT(faulting.fault(iova, Access::kRead), IsOk());
  ASSERT_NE(iommu.translate(iova, Access::kRead), nullptr);
  EXPECT_EQ(*iommu.translate(iova, Access::kWrite), std::byte{42});
  EXPECT_EQ(space.counters().mapped_pages, 4u);
  {
    const auto going = faulting.begin_invalidate(Pages(5, 1));
    EXPECT_EQ(iommu.translate(iova, Access::kRead), nullptr);
    EXPECT_FALSE(pins_->pages.empty());
    ASSERT_EQ(fallocate(ram_.fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0x5000, 0x1000), 0);
  }
  EXPECT_NE(iommu.translate(Iova(0x6000), Access::kRead), nullptr);
  ASSERT_THAT(faulting.fault(iova, Access::kRead), IsOk());
  EXPECT_EQ(*iommu.translate(iova, Access::kRead), std::byte{0});
  *iommu.translate(iova, Access::kWrite) = std::byte{7};
  EXPECT_EQ(*ram_.at(0x5000), std::byte{7});
  EXPECT_EQ(space.counters().cuts, 0u);
  ASSERT_THAT(container_.detach(&faulting), IsOk());
}

}  // namespace
}  // namespace mvgpu::domain
