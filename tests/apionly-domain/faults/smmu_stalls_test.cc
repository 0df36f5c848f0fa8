#include "apionly-domain/faults/smmu_stalls.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "apionly-domain/faults/fault_queue.h"
#include "tests/apionly-domain/faults/answers.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::domain {
namespace {

using testing::Answers;
using ::testing::ElementsAre;
using testing::FailsWith;
using ::testing::IsEmpty;
using testing::IsOk;
using testing::MakeGroup;

SmmuEvent ExampleEvent() {
  SmmuEvent event;
  event.stream = 0xd10;
  event.substream = 5;
  event.tag = 0xab;
  event.is_stalled = event.is_read = true;
  event.address = 0x20'1234'5678;
  return event;
}

TEST(SmmuRecordsTest, TheEventsOfTheSeed) {
  EXPECT_THAT(ExampleEvent().encode(),
              ElementsAre(0x0000'0d10'0000'5810, 0x0000'0208'8000'00ab, 0x20'1234'5678, 0));
  SmmuEvent event = ExampleEvent();
  event.is_stage2 = true;
  event.stage2_address = 0x4567'8000;
  EXPECT_THAT(event.encode(), ElementsAre(0x0000'0d10'0000'5810, 0x0000'0288'8000'00ab,
                                          0x20'1234'5678, 0x4567'8000));
  EXPECT_EQ(*SmmuEvent::Decode(event.encode()), event);
  EXPECT_EQ(*SmmuEvent::Decode(ExampleEvent().encode()), ExampleEvent());
}

TEST(SmmuRecordsTest, EveryBitHasItsPlace) {
  SmmuEvent event;
  event.input_class = 0;
  event.is_privileged = true;
  EXPECT_EQ(event.encode()[1], uint64_t{1} << 33);
  event.is_privileged = false;
  event.is_instruction = true;
  EXPECT_EQ(event.encode()[1], uint64_t{1} << 34);
  for (const uint64_t type : {0x1, 0xf, 0x14, 0x24}) {
    EXPECT_THAT(SmmuEvent::Decode({type, 0, 0, 0}), FailsWith(ErrorCode::kInvalid));
  }
  EXPECT_EQ(SmmuEvent::Decode({0x13, 0, 0, 0})->type, SmmuEvent::Type::kPermission);
}

TEST(SmmuRecordsTest, TheCommandsOfTheSeed) {
  SmmuResume resume{0xd10, 0xab, SmmuResume::Response::kRetry};
  EXPECT_THAT(resume.encode(), ElementsAre(0x0000'0d10'0000'1044, 0xab));
  EXPECT_EQ(*SmmuResume::Decode({0x0000'0d10'0000'1044, 0xab}), resume);
  resume.response = SmmuResume::Response::kAbort;
  EXPECT_THAT(resume.encode(), ElementsAre(0x0000'0d10'0000'2044, 0xab));
  EXPECT_EQ(*SmmuResume::Decode({0x0000'0d10'0000'2044, 0xab}), resume);
  resume.response = SmmuResume::Response::kTerminate;
  EXPECT_THAT(resume.encode(), ElementsAre(0x0000'0d10'0000'0044, 0xab));
  resume.tag.reset();
  EXPECT_THAT(resume.encode(), ElementsAre(0x0000'0d10'0000'0045, 0));
  EXPECT_EQ(*SmmuResume::Decode({0x0000'0d10'0000'0045, 0}), resume);
  EXPECT_THAT(SmmuResume::Decode({0x3044, 0}), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(SmmuResume::Decode({0x46, 0}), FailsWith(ErrorCode::kInvalid));
}

// A device behind an SMMU, its event queue, the driver, and a fault queue behind it.
class SmmuStallsTest : public ::testing::Test, public SmmuStalls::Port {
 protected:
  void SetUp() override {
    queue_ = *FaultQueue::Create({}, nullptr);
    handler_.emplace(&smmu_, queue_.get());
  }
  void TearDown() override { queue_->close(); }
  Result<void> on_event(const SmmuEvent::Words& words) override {
    if (is_full_) return Fail(ErrorCode::kLimit, "the event queue is full");
    events_.push_back(words);
    return {};
  }
  void Stall(FaultGroup group) { ASSERT_THAT(smmu_.submit(std::move(group), &device_), IsOk()); }
  SmmuEvent LastEvent() const { return *SmmuEvent::Decode(events_.back()); }

  bool is_full_ = false;
  std::vector<SmmuEvent::Words> events_;
  Answers device_;
  std::unique_ptr<FaultQueue> queue_;
  SmmuStalls smmu_{this, 4};
  std::optional<SmmuStallHandler> handler_;
};

TEST_F(SmmuStallsTest, AnAccessWaitsUntilTheDriverResumesIt) {
  FaultGroup group = MakeGroup(1, 1, 0x20'1234'5678, 0xd10);
  group.pasid = 5;
  group.requests[0].rights = kFaultRead;
  Stall(group);
  SmmuEvent expected = ExampleEvent();
  expected.tag = LastEvent().tag;
  EXPECT_EQ(LastEvent(), expected);
  ASSERT_TRUE(handler_->handle(events_.back()));
  const auto taken = queue_->take();
  ASSERT_TRUE(taken.has_value());
  EXPECT_EQ(taken->group.device, 0xd10u);
  EXPECT_EQ(taken->group.pasid, 5u);
  EXPECT_EQ(taken->group.requests, (std::vector<PageRequest>{{kFaultRead, 0x20'1234'5678, 1, 0}}));
  EXPECT_EQ(smmu_.waiting(), 1u);
  ASSERT_THAT(queue_->answer(taken->cookie, FaultAnswer::kSuccess), IsOk());
  EXPECT_THAT(device_.of(1), ElementsAre(FaultAnswer::kSuccess));
  EXPECT_EQ(smmu_.waiting(), 0u);
}

TEST_F(SmmuStallsTest, TheStageAndItsAddressArrive) {
  FaultGroup group = MakeGroup(1);
  group.requests = {{kFaultWrite | kFaultPrivileged, 0x5'0000, 2, 0x4567'8123}};
  Stall(group);
  ASSERT_TRUE(handler_->handle(events_.back()));
  EXPECT_EQ(queue_->take()->group.requests,
            (std::vector<PageRequest>{{kFaultWrite | kFaultPrivileged, 0x5'0000, 2, 0x4567'8000}}));
}

TEST_F(SmmuStallsTest, InvalidAndFailureAreAborts) {
  for (const FaultAnswer answer : {FaultAnswer::kInvalid, FaultAnswer::kFailure}) {
    const auto tag = static_cast<uint64_t>(answer);
    Stall(MakeGroup(tag));
    ASSERT_TRUE(handler_->handle(events_.back()));
    ASSERT_THAT(queue_->answer(queue_->take()->cookie, answer), IsOk());
    EXPECT_THAT(device_.of(tag), ElementsAre(FaultAnswer::kInvalid));
  }
}

TEST_F(SmmuStallsTest, EachTagIsResumedOnceAndByItsStream) {
  Stall(MakeGroup(1));
  Stall(MakeGroup(2));
  const uint16_t tag = LastEvent().tag;
  const auto resume = [&](uint32_t stream, uint16_t of) {
    return smmu_.command(SmmuResume{stream, of, SmmuResume::Response::kRetry}.encode());
  };
  EXPECT_THAT(resume(8, tag), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(resume(7, static_cast<uint16_t>(tag + 1)), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(resume(7, tag), IsOk());
  EXPECT_THAT(resume(7, tag), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(device_.of(2), ElementsAre(FaultAnswer::kSuccess));
  EXPECT_THAT(device_.of(1), IsEmpty());
}

TEST_F(SmmuStallsTest, AStreamIsTerminatedAsAWhole) {
  Stall(MakeGroup(1, 1, 0x1000, 7));
  Stall(MakeGroup(2, 1, 0x1000, 8));
  Stall(MakeGroup(3, 1, 0x2000, 7));
  EXPECT_THAT(smmu_.command({0x0000'0007'0000'0045, 0}), IsOk());
  EXPECT_THAT(device_.of(1), ElementsAre(FaultAnswer::kInvalid));
  EXPECT_THAT(device_.of(3), ElementsAre(FaultAnswer::kInvalid));
  EXPECT_THAT(device_.of(2), IsEmpty());
  EXPECT_EQ(smmu_.waiting(), 1u);
}

TEST_F(SmmuStallsTest, WhatCannotWaitIsRefused) {
  EXPECT_THAT(smmu_.submit(MakeGroup(1, 2), &device_), FailsWith(ErrorCode::kInvalid));
  for (uint64_t tag = 1; tag <= 4; ++tag) Stall(MakeGroup(tag));
  EXPECT_THAT(smmu_.submit(MakeGroup(5), &device_), FailsWith(ErrorCode::kLimit));
  ASSERT_THAT(smmu_.command({0x0000'0007'0000'0045, 0}), IsOk());
  is_full_ = true;
  EXPECT_THAT(smmu_.submit(MakeGroup(6), &device_), FailsWith(ErrorCode::kLimit));
  EXPECT_EQ(smmu_.waiting(), 0u);
  EXPECT_THAT(device_.of(6), IsEmpty());
}

TEST_F(SmmuStallsTest, TagsGoRound) {
  for (uint64_t i = 0; i < 70000; ++i) {
    Stall(MakeGroup(1));
    if (i == 0) continue;  // stays, so that its tag is passed over
    const uint16_t tag = LastEvent().tag;
    EXPECT_NE(tag, SmmuEvent::Decode(events_.front())->tag);
    ASSERT_THAT(smmu_.command(SmmuResume{7, tag, SmmuResume::Response::kRetry}.encode()), IsOk());
  }
  EXPECT_EQ(smmu_.waiting(), 1u);
}

TEST_F(SmmuStallsTest, EventsThatNobodyWaitsForAreLeftAlone) {
  SmmuEvent event = ExampleEvent();
  event.is_stalled = false;
  EXPECT_FALSE(handler_->handle(event.encode()));
  EXPECT_FALSE(handler_->handle({0x2, 0, 0, 0}));
  EXPECT_EQ(queue_->counters().accepted, 0u);
}

TEST_F(SmmuStallsTest, WhatTheSinkRefusesIsAborted) {
  queue_->close();
  Stall(MakeGroup(1));
  ASSERT_TRUE(handler_->handle(events_.back()));
  EXPECT_THAT(device_.of(1), ElementsAre(FaultAnswer::kInvalid));
}

}  // namespace
}  // namespace mvgpu::domain
