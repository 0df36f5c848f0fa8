#include "apionly-domain/faults/fault_router.h"

#include "apionly-domain/faults/smmu_stalls.h"
#include "apionly-domain/faults/vtd_page_requests.h"
#include "apionly-domain/nested/guest_tables.h"
#include "apionly-domain/nested/vtd_first_stage.h"
#include "tests/apionly-domain/faults/answers.h"
#include "tests/apionly-domain/faults/faulting_fixture.h"

namespace mvgpu::domain {
namespace {

using testing::Answers;
using ::testing::ElementsAre;
using ::testing::IsEmpty;
using testing::IsOk;
using testing::MakeGroup;

// A guest with tables of VT-d's first stage for one of its devices, memory that is mapped on
// demand, and a queue of its own for the faults that are the guest's.
class FaultRouterTest : public FaultingTest, public FaultRouter::Spaces {
 protected:
  static constexpr uint32_t kDevice = 7;  // has tables of the guest
  static constexpr uint32_t kOther = 8;   // uses guest-physical addresses
  static constexpr uint64_t kRoot = 0x40'0000 - 0x8000;
  static constexpr uint64_t kGuestRing = 0x8000;

  void SetUp() override {
    FaultingTest::SetUp();
    Map(0, 0, 0x40'0000);
    queue_ = *FaultQueue::Create({}, &times_);
    guest_ring_.emplace(domain_.get(), nullptr);
    guest_ring_->set_address(kGuestRing);
    tables_.emplace(domain_.get());
    walker_.emplace(VtdFirstStageFormat{}, &*tables_);
    router_.emplace(FaultRouter::Parts{queue_.get(), faulting_.get(), this, &*guest_ring_});
  }
  void TearDown() override {
    guest_ring_->drop_all();
    router_.reset();
    queue_->close();
    FaultingTest::TearDown();
  }
  std::optional<FaultRouter::StageOne> stage_one(uint32_t device,
                                                 std::optional<uint32_t> pasid) const override {
    if (device != kDevice || pasid != 0x12345u) return std::nullopt;
    return FaultRouter::StageOne{&*walker_, kRoot};
  }
  // The guest maps one page of the device's: four levels, all indexes of the upper ones 0.
  void GuestMaps(uint64_t address, uint64_t frame, uint64_t flags) {
    for (uint64_t level = 0; level < 3; ++level) {
      ram_.put(kRoot + level * 0x1000, (kRoot + (level + 1) * 0x1000) | 7);
    }
    ram_.put(kRoot + 3 * 0x1000 + address / kPageSize * 8, frame | flags);
  }
  void Raise(uint64_t tag, PageRequest request, uint32_t device = kDevice) {
    FaultGroup group;
    group.device = device;
    group.pasid = 0x12345;
    group.id = static_cast<uint32_t>(tag);
    group.tag = tag;
    group.requests = {request};
    ASSERT_THAT(queue_->submit(std::move(group), &device_), IsOk());
  }
  // The guest's driver answers the group in its ring.
  void GuestAnswers(uint16_t group, FaultAnswer answer) {
    const VtdGroupResponse response{kDevice, 0x12345, group, true, answer};
    ASSERT_THAT(guest_ring_->respond(response.encode()), IsOk());
  }
  void HandleAll() {
    while (router_->handle_one()) {
    }
  }

  Answers device_;
  std::unique_ptr<FaultQueue> queue_;
  std::optional<VtdPageRequestQueue> guest_ring_;
  std::optional<DomainTables> tables_;
  std::optional<VtdFirstStage> walker_;
  std::optional<FaultRouter> router_;
};

TEST_F(FaultRouterTest, WithoutGuestTablesAFaultIsOneOfMemory) {
  Raise(1, {kFaultWrite, 0x5123}, kOther);
  EXPECT_TRUE(Shown().empty());
  EXPECT_TRUE(router_->handle_one());
  EXPECT_FALSE(router_->handle_one());
  EXPECT_THAT(device_.of(1), ElementsAre(FaultAnswer::kSuccess));
  EXPECT_EQ(Shown(), Numbers(5, 1));
  for (const FaultStep step : {FaultStep::kReport, FaultStep::kQueue, FaultStep::kPin,
                               FaultStep::kMap, FaultStep::kResume}) {
    EXPECT_EQ(times_.of(step).count, 1u) << FaultStepName(step);
  }
}

TEST_F(FaultRouterTest, WhatIsNotInMemoryIsInvalid) {
  Raise(1, {kFaultWrite, 0x4000'0000}, kOther);
  HandleAll();
  EXPECT_THAT(device_.of(1), ElementsAre(FaultAnswer::kInvalid));
  EXPECT_EQ(router_->counters().invalid, 1u);
}

TEST_F(FaultRouterTest, AGroupIsResolvedAsAWholeOrInvalid) {
  FaultGroup group = MakeGroup(1, 3, 0x5000, kOther);
  ASSERT_THAT(queue_->submit(group, &device_), IsOk());
  group = MakeGroup(2, 2, 0x3f'f000, kOther);  // the second is behind the end of memory
  ASSERT_THAT(queue_->submit(group, &device_), IsOk());
  HandleAll();
  EXPECT_THAT(device_.of(1), ElementsAre(FaultAnswer::kSuccess));
  EXPECT_THAT(device_.of(2), ElementsAre(FaultAnswer::kInvalid));
}

TEST_F(FaultRouterTest, WhereTheGuestMapsThePageTheHostResolvesItAlone) {
  GuestMaps(0x5000, 0x2'3000, 7);
  Raise(1, {kFaultRead, 0x5678});
  HandleAll();
  EXPECT_THAT(device_.of(1), ElementsAre(FaultAnswer::kSuccess));
  EXPECT_EQ(Shown(), Numbers(0x23, 1));
  EXPECT_EQ(guest_ring_->counters().entries, 0u);
}

TEST_F(FaultRouterTest, AStageTwoFaultOfTheHardwareNeedsNoWalk) {
  Raise(1, {kFaultRead, 0x5678, 2, 0x3'4000});
  HandleAll();
  EXPECT_THAT(device_.of(1), ElementsAre(FaultAnswer::kSuccess));
  EXPECT_EQ(Shown(), Numbers(0x34, 1));
}

TEST_F(FaultRouterTest, AStageOneFaultGoesToTheGuestAndItsAnswerComesBack) {
  GuestMaps(0x5000, 0, 0);
  Raise(1, {kFaultWrite, 0x5678});
  HandleAll();
  EXPECT_THAT(device_.of(1), IsEmpty());
  EXPECT_TRUE(Shown().empty());
  // An entry as the guest's driver knows them: RID 7, PASID 0x12345, group 1, write, last.
  EXPECT_EQ(ram_.get<uint64_t>(kGuestRing), 0x0001'2345'0007'0101u);
  EXPECT_EQ(ram_.get<uint64_t>(kGuestRing + 8), 0x500eu);
  GuestMaps(0x5000, 0x2'3000, 7);
  GuestAnswers(1, FaultAnswer::kSuccess);
  EXPECT_THAT(device_.of(1), ElementsAre(FaultAnswer::kSuccess));
  // The device tries again, and now it is the host's turn.
  Raise(2, {kFaultWrite, 0x5678});
  HandleAll();
  EXPECT_THAT(device_.of(2), ElementsAre(FaultAnswer::kSuccess));
  EXPECT_EQ(Shown(), Numbers(0x23, 1));
  EXPECT_EQ(router_->counters().forwarded, 1u);
  EXPECT_EQ(router_->counters().resolved, 1u);
}

TEST_F(FaultRouterTest, TheGuestMayRefuse) {
  Raise(1, {kFaultWrite, 0x5678});
  HandleAll();
  GuestAnswers(1, FaultAnswer::kInvalid);
  EXPECT_THAT(device_.of(1), ElementsAre(FaultAnswer::kInvalid));
}

TEST_F(FaultRouterTest, MissingRightsAreTheGuestsToGive) {
  GuestMaps(0x5000, 0x2'3000, 5);  // read only
  Raise(1, {kFaultRead, 0x5000});
  Raise(2, {kFaultWrite, 0x5000});
  HandleAll();
  EXPECT_THAT(device_.of(1), ElementsAre(FaultAnswer::kSuccess));
  EXPECT_THAT(device_.of(2), IsEmpty());
  EXPECT_EQ(guest_ring_->counters().waiting, 1u);
}

TEST_F(FaultRouterTest, TablesThatAreWrongAreInvalidAtOnce) {
  ram_.put(kRoot, uint64_t{0x7fff'f000'0007});  // the next table is not in memory
  Raise(1, {kFaultWrite, 0x5678});
  HandleAll();
  EXPECT_THAT(device_.of(1), ElementsAre(FaultAnswer::kInvalid));
  EXPECT_EQ(guest_ring_->counters().entries, 0u);
}

TEST_F(FaultRouterTest, AGuestWhoseQueueIsFullHasItsFaultsRefused) {
  guest_ring_->set_address(0x4000'0000);  // not even in memory
  Raise(1, {kFaultWrite, 0x5678});
  HandleAll();
  EXPECT_THAT(device_.of(1), ElementsAre(FaultAnswer::kInvalid));
  EXPECT_EQ(router_->counters().forwarded, 0u);
}

TEST_F(FaultRouterTest, AnAnswerForADeviceThatHasGoneIsNobodys) {
  Raise(1, {kFaultWrite, 0x5678});
  HandleAll();
  EXPECT_EQ(queue_->detach(kDevice), 1u);
  EXPECT_THAT(device_.of(1), ElementsAre(FaultAnswer::kInvalid));
  GuestAnswers(1, FaultAnswer::kSuccess);
  EXPECT_FALSE(device_.any_twice());
  EXPECT_EQ(router_->counters().late_answers, 1u);
}

TEST_F(FaultRouterTest, MemoryThatIsBeingGivenBackIsTriedAgainByTheDevice) {
  const auto going = faulting_->begin_invalidate(Pages(5, 1));
  Raise(1, {kFaultWrite, 0x5678}, kOther);
  HandleAll();
  EXPECT_THAT(device_.of(1), ElementsAre(FaultAnswer::kSuccess));
  EXPECT_TRUE(Shown().empty());
}

// A guest with an SMMU of its own, whose events say the stage.
class GuestSmmu final : public SmmuStalls::Port {
 public:
  Result<void> on_event(const SmmuEvent::Words& words) override {
    events.push_back(*SmmuEvent::Decode(words));
    return {};
  }
  std::vector<SmmuEvent> events;
};

TEST_F(FaultRouterTest, TheGuestsOwnSmmuSaysTheStageAndItsCommandIsTheAnswer) {
  GuestSmmu guest;
  SmmuStalls guest_smmu(&guest);
  router_.reset();
  router_.emplace(FaultRouter::Parts{queue_.get(), faulting_.get(), this, &guest_smmu});
  Raise(1, {kFaultRead, 0x5678});
  Raise(2, {kFaultRead, 0x6000, 2, 0x3'4000});
  HandleAll();
  // Stage 2 is the host's, and the guest never hears of it.
  EXPECT_THAT(device_.of(2), ElementsAre(FaultAnswer::kSuccess));
  ASSERT_EQ(guest.events.size(), 1u);
  EXPECT_FALSE(guest.events[0].is_stage2);
  EXPECT_TRUE(guest.events[0].is_stalled);
  EXPECT_EQ(guest.events[0].address, 0x5678u);
  EXPECT_EQ(guest.events[0].substream, 0x12345u);
  EXPECT_THAT(device_.of(1), IsEmpty());
  const SmmuResume abort{kDevice, guest.events[0].tag, SmmuResume::Response::kAbort};
  ASSERT_THAT(guest_smmu.command(abort.encode()), IsOk());
  EXPECT_THAT(device_.of(1), ElementsAre(FaultAnswer::kInvalid));
}

// The same from the device's side: an SMMU that says the stage.
class StalledDeviceTest : public FaultRouterTest, public SmmuStalls::Port {
 protected:
  Result<void> on_event(const SmmuEvent::Words& words) override {
    EXPECT_TRUE(handler_->handle(words));
    return {};
  }
  std::optional<SmmuStallHandler> handler_;
};

TEST_F(StalledDeviceTest, AStalledAccessGoesOnWhenItsPageIsThere) {
  SmmuStalls smmu(this);
  handler_.emplace(&smmu, queue_.get());
  FaultGroup access = MakeGroup(1, 1, 0x77'0000, kOther);
  access.requests[0].stage = 2;
  access.requests[0].stage2_address = 0x9'9000;
  ASSERT_THAT(smmu.submit(access, &device_), IsOk());
  EXPECT_EQ(smmu.waiting(), 1u);
  HandleAll();
  EXPECT_THAT(device_.of(1), ElementsAre(FaultAnswer::kSuccess));
  EXPECT_EQ(Shown(), Numbers(0x99, 1));
  EXPECT_EQ(smmu.waiting(), 0u);
}

}  // namespace
}  // namespace mvgpu::domain
