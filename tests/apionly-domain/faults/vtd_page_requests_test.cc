#include "apionly-domain/faults/vtd_page_requests.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "apionly-domain/faults/fault_queue.h"
#include "tests/apionly-domain/domain_fixture.h"
#include "tests/apionly-domain/faults/answers.h"

namespace mvgpu::domain {
namespace {

using testing::Answers;
using ::testing::ElementsAre;
using testing::FailsWith;
using ::testing::IsEmpty;
using testing::IsOk;
using testing::MakeGroup;

VtdPageRequest ExampleRequest() {
  VtdPageRequest request;
  request.requester = 0x3a91;
  request.pasid = 0x12345;
  request.group = 0x1a5;
  request.reads = request.writes = request.is_last = true;
  request.address = 0x7f12'3456'7000;
  return request;
}

TEST(VtdPageRecordsTest, TheRequestOfTheSeed) {
  EXPECT_THAT(ExampleRequest().encode(),
              ElementsAre(0x0001'2345'3a91'0101, 0x0000'7f12'3456'7d2f, 0, 0));
  const auto decoded = VtdPageRequest::Decode({0x0001'2345'3a91'0101, 0x0000'7f12'3456'7d2f, 0, 0});
  ASSERT_THAT(decoded, IsOk());
  EXPECT_EQ(*decoded, ExampleRequest());
}

TEST(VtdPageRecordsTest, EveryBitHasItsPlace) {
  VtdPageRequest request;
  request.executes = true;
  EXPECT_EQ(request.encode()[0], uint64_t{1} << 52 | 1);
  request.executes = false;
  request.is_privileged = true;
  EXPECT_EQ(request.encode()[0], uint64_t{1} << 53 | 1);
  request = {};
  request.reads = true;
  EXPECT_EQ(request.encode()[1], 1u);
  request = {};
  request.writes = true;
  EXPECT_EQ(request.encode()[1], 2u);
  request = {};
  request.is_last = true;
  EXPECT_EQ(request.encode()[1], 4u);
  EXPECT_TRUE(request.is_stop_marker());
  request.group = 0x1ff;
  EXPECT_EQ(request.encode()[1], 0xffcu);
  EXPECT_EQ(*VtdPageRequest::Decode(request.encode()), request);
  EXPECT_THAT(VtdPageRequest::Decode({2, 0, 0, 0}), FailsWith(ErrorCode::kInvalid));
}

TEST(VtdPageRecordsTest, TheResponsesOfTheSeed) {
  VtdGroupResponse response{0x3a91, 0x12345, 0x1a5, true, FaultAnswer::kSuccess};
  EXPECT_THAT(response.encode(), ElementsAre(0x0001'2345'3a91'0019, 0xd2c));
  response.answer = FaultAnswer::kInvalid;
  EXPECT_THAT(response.encode(), ElementsAre(0x0001'2345'3a91'1019, 0xd2c));
  EXPECT_EQ(*VtdGroupResponse::Decode({0x0001'2345'3a91'1019, 0xd2c}), response);
  response.answer = FaultAnswer::kFailure;
  EXPECT_THAT(response.encode(), ElementsAre(0x0001'2345'3a91'f019, 0xd2c));
  EXPECT_EQ(*VtdGroupResponse::Decode({0x0001'2345'3a91'f019, 0xd2c}), response);
}

TEST(VtdPageRecordsTest, AResponseWithReservedBitsOrAnUnknownCodeIsNone) {
  const uint64_t good = 0x0001'2345'3a91'0019;
  EXPECT_THAT(VtdGroupResponse::Decode({good, 0xd2c}), IsOk());
  for (unsigned bit = 0; bit < 64; ++bit) {
    const uint64_t mask = uint64_t{1} << bit;
    if ((0xffff'ffff'ffff'f003 & mask) != 0) {
      EXPECT_THAT(VtdGroupResponse::Decode({good, 0xd2c | mask}), FailsWith(ErrorCode::kInvalid));
    }
    if (bit >= 52 || (bit >= 5 && bit < 12)) {
      EXPECT_THAT(VtdGroupResponse::Decode({good | mask, 0xd2c}), FailsWith(ErrorCode::kInvalid));
    }
  }
  EXPECT_THAT(VtdGroupResponse::Decode({good | 0x2000, 0xd2c}), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(VtdGroupResponse::Decode({good & ~uint64_t{1}, 0xd2c}),
              FailsWith(ErrorCode::kInvalid));
}

// A device, its IOMMU with the ring in guest memory, the driver, and a fault queue behind it.
class VtdPageRequestsTest : public DomainTest, public VtdPageRequestQueue::Owner {
 protected:
  static constexpr uint64_t kRing = 0x8000;
  static constexpr uint64_t kEntries = 128;

  void SetUp() override {
    DomainTest::SetUp();
    Map(0, 0, 0x10'0000);
    queue_ = *FaultQueue::Create({}, nullptr);
    iommu_.emplace(domain_.get(), this);
    iommu_->set_address(kRing);
    Handle({});
  }
  void TearDown() override {
    queue_->close();
    iommu_.reset();
    handler_.reset();
    DomainTest::TearDown();
  }
  void Handle(VtdPageRequestHandler::Options options) {
    handler_.emplace(domain_.get(), &*iommu_, queue_.get(), std::move(options));
  }
  void on_page_request_event() override { ++interrupts_; }
  // Entries that no device of ours writes: puts them in the place of as many that one did.
  void Forge(const std::vector<VtdPageRequest>& entries) {
    for (uint64_t i = 0; i < entries.size(); ++i) {
      ASSERT_THAT(iommu_->submit(MakeGroup(i), &device_), IsOk());
      ram_.put(kRing + i * VtdPageRequest::kBytes, entries[i].encode());
    }
  }

  uint64_t interrupts_ = 0;
  Answers device_;
  std::unique_ptr<FaultQueue> queue_;
  std::optional<VtdPageRequestQueue> iommu_;
  std::optional<VtdPageRequestHandler> handler_;
};

TEST_F(VtdPageRequestsTest, AGroupGoesThroughTheRingAndItsAnswerComesBack) {
  FaultGroup group = MakeGroup(0x1a5, 2, 0x7f12'3456'6000, 0x3a91);
  group.pasid = 0x12345;
  ASSERT_THAT(iommu_->submit(group, &device_), IsOk());
  EXPECT_EQ(interrupts_, 1u);
  EXPECT_EQ(iommu_->status(), VtdPageRequestQueue::kPending);
  EXPECT_EQ(iommu_->tail(), 64u);
  EXPECT_EQ(ram_.get<uint64_t>(kRing), 0x0001'2345'3a91'0101u);
  EXPECT_EQ(ram_.get<uint64_t>(kRing + 8), 0x7f12'3456'6d2au);
  EXPECT_EQ(ram_.get<uint64_t>(kRing + 40), 0x7f12'3456'7d2eu);

  ASSERT_THAT(handler_->poll(), IsOk());
  EXPECT_EQ(iommu_->head(), 64u);
  EXPECT_EQ(iommu_->status(), 0u);
  const auto taken = queue_->take();
  ASSERT_TRUE(taken.has_value());
  EXPECT_EQ(taken->group.requests, group.requests);
  EXPECT_EQ(taken->group.pasid, 0x12345u);
  EXPECT_THAT(device_.of(0x1a5), IsEmpty());
  ASSERT_THAT(queue_->answer(taken->cookie, FaultAnswer::kSuccess), IsOk());
  EXPECT_THAT(device_.of(0x1a5), ElementsAre(FaultAnswer::kSuccess));
  EXPECT_EQ(iommu_->counters().waiting, 0u);
}

TEST_F(VtdPageRequestsTest, GroupsThatAreMixedInTheRingComeOutWhole) {
  const auto entry = [](uint16_t requester, uint16_t group, uint64_t address, bool is_last) {
    VtdPageRequest request = ExampleRequest();
    request.requester = requester;
    request.group = group;
    request.address = address;
    request.is_last = is_last;
    return request;
  };
  Forge({entry(0x3a91, 1, 0x1000, false), entry(0x3a91, 2, 0x2000, false),
         entry(0x3a92, 2, 0x3000, false), entry(0x3a91, 2, 0x4000, true)});
  ASSERT_THAT(handler_->poll(), IsOk());
  const auto taken = queue_->take();
  ASSERT_TRUE(taken.has_value());
  EXPECT_EQ(taken->group.id, 2u);
  ASSERT_EQ(taken->group.requests.size(), 2u);
  EXPECT_EQ(taken->group.requests[0].address, 0x2000u);
  EXPECT_EQ(taken->group.requests[1].address, 0x4000u);
  EXPECT_FALSE(queue_->take().has_value());
  EXPECT_EQ(handler_->counters().groups, 1u);
}

TEST_F(VtdPageRequestsTest, TheRingGoesRound) {
  for (uint64_t i = 0; i < 3 * kEntries; ++i) {
    ASSERT_THAT(iommu_->submit(MakeGroup(i), &device_), IsOk());
    ASSERT_THAT(handler_->poll(), IsOk());
    const auto taken = queue_->take();
    ASSERT_TRUE(taken.has_value());
    ASSERT_THAT(queue_->answer(taken->cookie, FaultAnswer::kSuccess), IsOk());
  }
  EXPECT_EQ(device_.size(), 3 * kEntries);
  EXPECT_EQ(iommu_->tail(), 0u);
}

TEST_F(VtdPageRequestsTest, AFullRingOverflowsUntilTheDriverClearsIt) {
  for (uint64_t i = 0; i < kEntries - 1; ++i) {
    ASSERT_THAT(iommu_->submit(MakeGroup(i), &device_), IsOk());
  }
  EXPECT_EQ(interrupts_, 1u);
  EXPECT_THAT(iommu_->submit(MakeGroup(500), &device_), FailsWith(ErrorCode::kLimit));
  EXPECT_EQ(interrupts_, 2u);
  EXPECT_EQ(iommu_->status(), VtdPageRequestQueue::kPending | VtdPageRequestQueue::kOverflow);
  // Room alone does not help: the driver has to see it.
  iommu_->set_head(64);
  EXPECT_THAT(iommu_->submit(MakeGroup(501), &device_), FailsWith(ErrorCode::kLimit));
  EXPECT_EQ(iommu_->counters().dropped, 2u);
  iommu_->set_head(0);
  ASSERT_THAT(handler_->poll(), IsOk());
  EXPECT_EQ(iommu_->status(), 0u);
  EXPECT_EQ(handler_->counters().overflows, 1u);
  EXPECT_EQ(handler_->counters().groups, kEntries - 1);
  EXPECT_THAT(iommu_->submit(MakeGroup(500), &device_), IsOk());
}

TEST_F(VtdPageRequestsTest, AfterAnOverflowGroupsWithoutALastRequestAreDiscarded) {
  for (uint64_t i = 0; i < kEntries - 2; ++i) {
    ASSERT_THAT(iommu_->submit(MakeGroup(i), &device_), IsOk());
  }
  EXPECT_THAT(iommu_->submit(MakeGroup(500, 2, 0xa000), &device_), FailsWith(ErrorCode::kLimit));
  ASSERT_THAT(handler_->poll(), IsOk());
  EXPECT_EQ(handler_->counters().discarded, 1u);
  queue_->detach(7);
  // The device asks again, with the same number: nothing of before is left.
  ASSERT_THAT(iommu_->submit(MakeGroup(500, 1, 0xb000), &device_), IsOk());
  ASSERT_THAT(handler_->poll(), IsOk());
  const auto taken = queue_->take();
  ASSERT_TRUE(taken.has_value());
  ASSERT_EQ(taken->group.requests.size(), 1u);
  EXPECT_EQ(taken->group.requests[0].address, 0xb000u);
}

TEST_F(VtdPageRequestsTest, RequestsThatNobodyMayMakeAreAnsweredInvalid) {
  FaultGroup group = MakeGroup(1, 1, uint64_t{1} << 56);  // not canonical
  ASSERT_THAT(iommu_->submit(group, &device_), IsOk());
  group = MakeGroup(2);
  group.requests[0].rights = kFaultRead | kFaultPrivileged;
  ASSERT_THAT(iommu_->submit(group, &device_), IsOk());
  group = MakeGroup(3);
  group.requests[0].rights = kFaultRead | kFaultExecute;
  ASSERT_THAT(iommu_->submit(group, &device_), IsOk());
  ASSERT_THAT(iommu_->submit(MakeGroup(4, 1, uint64_t{0xff} << 56), &device_), IsOk());
  ASSERT_THAT(handler_->poll(), IsOk());
  for (uint64_t tag = 1; tag <= 3; ++tag) {
    EXPECT_THAT(device_.of(tag), ElementsAre(FaultAnswer::kInvalid)) << tag;
  }
  EXPECT_THAT(device_.of(4), IsEmpty());
  EXPECT_EQ(queue_->counters().waiting, 1u);
  EXPECT_EQ(handler_->counters().bad, 3u);
}

TEST_F(VtdPageRequestsTest, UnknownDevicesAreAnsweredInvalid) {
  Handle({.knows = [](uint16_t requester) { return requester == 8; }});
  ASSERT_THAT(iommu_->submit(MakeGroup(1, 1, 0x1000, 7), &device_), IsOk());
  ASSERT_THAT(iommu_->submit(MakeGroup(2, 1, 0x1000, 8), &device_), IsOk());
  ASSERT_THAT(handler_->poll(), IsOk());
  EXPECT_THAT(device_.of(1), ElementsAre(FaultAnswer::kInvalid));
  EXPECT_THAT(device_.of(2), IsEmpty());
}

TEST_F(VtdPageRequestsTest, AStopMarkerHasNoAnswer) {
  FaultGroup group = MakeGroup(1);
  group.requests[0].rights = 0;
  ASSERT_THAT(iommu_->submit(group, &device_), IsOk());
  ASSERT_THAT(handler_->poll(), IsOk());
  EXPECT_EQ(handler_->counters().stop_markers, 1u);
  EXPECT_EQ(queue_->counters().accepted, 0u);
  EXPECT_EQ(device_.size(), 0u);
  EXPECT_EQ(iommu_->drop(7), 1u);
}

TEST_F(VtdPageRequestsTest, WhatTheSinkRefusesIsAnsweredInvalid) {
  queue_->close();
  ASSERT_THAT(iommu_->submit(MakeGroup(1), &device_), IsOk());
  ASSERT_THAT(handler_->poll(), IsOk());
  EXPECT_THAT(device_.of(1), ElementsAre(FaultAnswer::kInvalid));
}

TEST_F(VtdPageRequestsTest, RequestsWithoutALastOneAreLimited) {
  Handle({.max_partial_requests = 3});
  ASSERT_THAT(iommu_->submit(MakeGroup(1, 6), &device_), IsOk());
  ASSERT_THAT(handler_->poll(), IsOk());
  const auto taken = queue_->take();
  ASSERT_TRUE(taken.has_value());
  EXPECT_EQ(taken->group.requests.size(), 4u);
  EXPECT_EQ(handler_->counters().discarded, 2u);
}

TEST_F(VtdPageRequestsTest, AResponseThatNobodyWaitsForIsRefused) {
  ASSERT_THAT(iommu_->submit(MakeGroup(5), &device_), IsOk());
  const auto respond = [&](VtdGroupResponse response) {
    return iommu_->respond(response.encode());
  };
  EXPECT_THAT(respond({8, std::nullopt, 5, true, FaultAnswer::kSuccess}),
              FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(respond({7, std::nullopt, 6, true, FaultAnswer::kSuccess}),
              FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(respond({7, 0, 5, true, FaultAnswer::kSuccess}), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(respond({7, std::nullopt, 5, true, FaultAnswer::kFailure}), IsOk());
  EXPECT_THAT(respond({7, std::nullopt, 5, true, FaultAnswer::kSuccess}),
              FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(device_.of(5), ElementsAre(FaultAnswer::kFailure));
}

TEST_F(VtdPageRequestsTest, NumbersThatDoNotFitAndGroupsThatWaitAreRefused) {
  FaultGroup group = MakeGroup(1);
  group.id = 512;
  EXPECT_THAT(iommu_->submit(group, &device_), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(iommu_->submit(MakeGroup(1, 1, 0, 0x1'0000), &device_),
              FailsWith(ErrorCode::kInvalid));
  group = MakeGroup(1);
  group.pasid = 1 << 20;
  EXPECT_THAT(iommu_->submit(group, &device_), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(iommu_->submit(MakeGroup(1, 0), &device_), FailsWith(ErrorCode::kInvalid));
  ASSERT_THAT(iommu_->submit(MakeGroup(1), &device_), IsOk());
  EXPECT_THAT(iommu_->submit(MakeGroup(1), &device_), FailsWith(ErrorCode::kBusy));
  EXPECT_EQ(iommu_->drop(8), 0u);
  EXPECT_EQ(iommu_->drop(7), 1u);
  EXPECT_THAT(device_.of(1), ElementsAre(FaultAnswer::kInvalid));
}

TEST_F(VtdPageRequestsTest, ARingOutsideOfMemoryIsAnError) {
  iommu_->set_address(0x4000'0000);
  EXPECT_THAT(iommu_->submit(MakeGroup(1), &device_), FailsWith(ErrorCode::kNotMapped));
  EXPECT_EQ(iommu_->tail(), 0u);
  EXPECT_EQ(iommu_->counters().waiting, 0u);
}

// A guest that writes the ring's memory and registers at random: typed ends, bounded work.
TEST_F(VtdPageRequestsTest, AHostileRingEnds) {
  std::mt19937_64 random(7);
  for (int round = 0; round < 300; ++round) {
    for (uint64_t at = 0; at < kEntries * 32; at += 8) {
      const bool is_type = at % 32 == 0 && random() % 4 != 0;
      ram_.put(kRing + at, is_type ? (random() & ~uint64_t{0xff}) | 1 : random());
    }
    for (int i = 0; i < 20; ++i) {
      static_cast<void>(iommu_->submit(MakeGroup(random() % 512, 1 + random() % 4), &device_));
    }
    iommu_->set_head(random());
    iommu_->set_address(kRing | random() % 3);
    static_cast<void>(handler_->poll());
    while (const auto taken = queue_->take()) {
      static_cast<void>(queue_->answer(taken->cookie, FaultAnswer::kSuccess));
    }
    iommu_->drop_all();
  }
  EXPECT_LE(handler_->counters().entries, 300u * 512);
}

}  // namespace
}  // namespace mvgpu::domain
