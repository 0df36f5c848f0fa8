#include "apionly-domain/faults/fault_queue.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <thread>

#include "tests/apionly-domain/faults/answers.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::domain {
namespace {

using testing::Answers;
using ::testing::ElementsAre;
using testing::FailsWith;
using ::testing::IsEmpty;
using testing::IsOk;
using testing::IsOkAndHolds;
using testing::MakeGroup;

// The uapi's structures, as this test has them.
struct Record {
  uint32_t flags, dev_id, pasid, grpid, perm, reserved;
  uint64_t addr;
  uint32_t length, cookie;
  bool operator==(const Record&) const = default;
};
struct Response {
  uint32_t cookie, code;
};

class FaultQueueTest : public ::testing::Test {
 protected:
  void SetUp() override { Start({}); }
  void Start(FaultQueue::Options options) {
    auto queue = FaultQueue::Create(options, &times_);
    ASSERT_THAT(queue, IsOk());
    queue_ = std::move(*queue);
  }
  void Submit(FaultGroup group) { ASSERT_THAT(queue_->submit(std::move(group), &device_), IsOk()); }
  // What read(2) with a buffer for so many records returns.
  std::vector<Record> Read(size_t room) {
    std::vector<Record> records(room);
    const auto bytes = queue_->read(std::as_writable_bytes(std::span(records)));
    EXPECT_THAT(bytes, IsOk());
    records.resize(*bytes / sizeof(Record));
    return records;
  }
  Result<size_t> Write(const std::vector<Response>& responses) {
    return queue_->write(std::as_bytes(std::span(responses)));
  }
  bool IsReadable() const {
    pollfd fd{queue_->poll_fd(), POLLIN, 0};
    EXPECT_GE(poll(&fd, 1, 0), 0);
    return (fd.revents & POLLIN) != 0;
  }

  FaultTimes times_;
  Answers device_;
  std::unique_ptr<FaultQueue> queue_;
};

TEST_F(FaultQueueTest, ARecordIsWhatTheKernelsUserReads) {
  FaultGroup group;
  group.device = 0x3a91;
  group.pasid = 0x12345;
  group.id = 0x1a5;
  group.requests = {{kFaultRead, 0x7f12'3456'6000},
                    {kFaultRead | kFaultWrite | kFaultPrivileged, 0x7f12'3456'7000}};
  Submit(group);
  EXPECT_THAT(Read(2),
              ElementsAre(Record{1, 0x3a91, 0x12345, 0x1a5, 1, 0, 0x7f12'3456'6000, 0, 1},
                          Record{3, 0x3a91, 0x12345, 0x1a5, 0xb, 0, 0x7f12'3456'7000, 0, 1}));
}

TEST_F(FaultQueueTest, WithoutAPasidTheFlagIsNotSet) {
  Submit(MakeGroup(4));
  EXPECT_THAT(Read(1), ElementsAre(Record{2, 7, 0, 4, 2, 0, 0x1000, 0, 1}));
}

TEST_F(FaultQueueTest, OnlyWholeGroupsAreReadAndInOrder) {
  Submit(MakeGroup(1, 2));
  Submit(MakeGroup(2, 3));
  Submit(MakeGroup(3, 1));
  // The second does not fit beside the first, and the third does not overtake it.
  const auto first = Read(4);
  ASSERT_EQ(first.size(), 2u);
  EXPECT_EQ(first[0].cookie, first[1].cookie);
  EXPECT_EQ(first[0].grpid, 1u);
  const auto rest = Read(4);
  ASSERT_EQ(rest.size(), 4u);
  EXPECT_EQ(rest[0].grpid, 2u);
  EXPECT_EQ(rest[3].grpid, 3u);
  EXPECT_NE(rest[0].cookie, rest[3].cookie);
}

TEST_F(FaultQueueTest, AGroupThatDoesNotFitStaysAtTheHead) {
  Submit(MakeGroup(1, 3));
  EXPECT_THAT(Read(2), IsEmpty());
  EXPECT_THAT(Read(0), IsEmpty());
  EXPECT_TRUE(IsReadable());
  EXPECT_EQ(Read(3).size(), 3u);
  EXPECT_THAT(Read(3), IsEmpty());
}

TEST_F(FaultQueueTest, SizesThatAreNotWholeRecordsAreRefused) {
  Submit(MakeGroup(1));
  std::array<std::byte, 41> buffer{};
  for (const size_t size : {1u, 39u, 41u}) {
    const auto read = queue_->read(std::span(buffer).first(size));
    ASSERT_THAT(read, FailsWith(ErrorCode::kSystem));
    EXPECT_EQ(read.error().sys_errno(), ESPIPE);
  }
  const auto written = queue_->write(std::span(buffer).first(9));
  ASSERT_THAT(written, FailsWith(ErrorCode::kSystem));
  EXPECT_EQ(written.error().sys_errno(), ESPIPE);
  EXPECT_EQ(queue_->counters().waiting, 1u);
}

TEST_F(FaultQueueTest, GroupsAreAnsweredInAnyOrderAndOnce) {
  Submit(MakeGroup(1));
  Submit(MakeGroup(2));
  const auto records = Read(2);
  EXPECT_THAT(Write({{records[1].cookie, 1}}), IsOkAndHolds(sizeof(Response)));
  EXPECT_THAT(device_.of(1), IsEmpty());
  EXPECT_THAT(Write({{records[0].cookie, 0}}), IsOkAndHolds(sizeof(Response)));
  EXPECT_THAT(device_.of(1), ElementsAre(FaultAnswer::kSuccess));
  EXPECT_THAT(device_.of(2), ElementsAre(FaultAnswer::kInvalid));
  EXPECT_THAT(Write({{records[0].cookie, 0}}), FailsWith(ErrorCode::kInvalid));
  EXPECT_FALSE(device_.any_twice());
}

TEST_F(FaultQueueTest, AWriteStopsAtTheFirstResponseThatIsWrong) {
  for (uint64_t tag = 1; tag <= 3; ++tag) Submit(MakeGroup(tag));
  const auto records = Read(3);
  EXPECT_THAT(Write({{records[0].cookie, 0}, {records[1].cookie, 2}, {records[2].cookie, 0}}),
              IsOkAndHolds(sizeof(Response)));
  EXPECT_EQ(device_.size(), 1u);
  EXPECT_THAT(Write({{records[1].cookie, 0}, {0x1234, 0}, {records[2].cookie, 0}}),
              IsOkAndHolds(sizeof(Response)));
  EXPECT_EQ(device_.size(), 2u);
  EXPECT_EQ(Write({{0x1234, 0}, {records[2].cookie, 0}}).error().errno_value(), EINVAL);
  EXPECT_EQ(Write({{records[2].cookie, 2}}).error().errno_value(), EINVAL);
  EXPECT_THAT(Write({}), IsOkAndHolds(0u));
  EXPECT_EQ(queue_->counters().taken, 1u);
}

TEST_F(FaultQueueTest, AGroupThatNobodyHasReadCannotBeAnswered) {
  Submit(MakeGroup(1));
  EXPECT_THAT(Write({{0, 0}}), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(Write({{1, 0}}), FailsWith(ErrorCode::kInvalid));
  EXPECT_EQ(device_.size(), 0u);
}

// Linux hands the lowest free cookie out again, so that a second answer may meet another group.
TEST_F(FaultQueueTest, ACookieIsNotUsedAgain) {
  Submit(MakeGroup(1));
  const uint32_t cookie = Read(1)[0].cookie;
  ASSERT_THAT(Write({{cookie, 0}}), IsOk());
  Submit(MakeGroup(2));
  EXPECT_NE(Read(1)[0].cookie, cookie);
  EXPECT_THAT(Write({{cookie, 1}}), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(device_.of(2), IsEmpty());
}

TEST_F(FaultQueueTest, ItIsReadableExactlyWhileAGroupWaits) {
  EXPECT_FALSE(IsReadable());
  Submit(MakeGroup(1));
  Submit(MakeGroup(2));
  EXPECT_TRUE(IsReadable());
  Read(1);
  EXPECT_TRUE(IsReadable());
  Read(1);
  EXPECT_FALSE(IsReadable());
  Submit(MakeGroup(3));
  EXPECT_TRUE(IsReadable());
  queue_->detach(7);
  EXPECT_FALSE(IsReadable());
}

TEST_F(FaultQueueTest, WhatADeviceLeavesBehindIsAnsweredInvalid) {
  Submit(MakeGroup(1, 1, 0x1000, 7));
  Submit(MakeGroup(2, 1, 0x1000, 8));
  Submit(MakeGroup(3, 1, 0x1000, 7));
  const auto records = Read(2);
  EXPECT_EQ(queue_->detach(7), 2u);
  EXPECT_THAT(device_.of(1), ElementsAre(FaultAnswer::kInvalid));
  EXPECT_THAT(device_.of(3), ElementsAre(FaultAnswer::kInvalid));
  EXPECT_THAT(Write({{records[0].cookie, 0}}), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(Write({{records[1].cookie, 0}}), IsOk());
  EXPECT_THAT(device_.of(2), ElementsAre(FaultAnswer::kSuccess));
  EXPECT_FALSE(device_.any_twice());
  EXPECT_EQ(queue_->detach(7), 0u);
}

TEST_F(FaultQueueTest, OneAddressSpaceOfADeviceMayGoAlone) {
  FaultGroup with_pasid = MakeGroup(1);
  with_pasid.pasid = 5;
  FaultGroup other = MakeGroup(2);
  other.pasid = 6;
  Submit(with_pasid);
  Submit(other);
  Submit(MakeGroup(3));
  EXPECT_EQ(queue_->detach(7, 5), 1u);
  EXPECT_THAT(device_.of(1), ElementsAre(FaultAnswer::kInvalid));
  EXPECT_EQ(device_.size(), 1u);
}

TEST_F(FaultQueueTest, ClosingAnswersAllAndAcceptsNoMore) {
  Submit(MakeGroup(1));
  Submit(MakeGroup(2));
  Read(1);
  queue_->close();
  EXPECT_THAT(device_.of(1), ElementsAre(FaultAnswer::kInvalid));
  EXPECT_THAT(device_.of(2), ElementsAre(FaultAnswer::kInvalid));
  EXPECT_THAT(queue_->submit(MakeGroup(3), &device_), FailsWith(ErrorCode::kRevoked));
  EXPECT_EQ(queue_->counters().auto_answered, 2u);
  queue_.reset();
  EXPECT_EQ(device_.size(), 2u);
  EXPECT_FALSE(device_.any_twice());
}

TEST_F(FaultQueueTest, RequestsWithoutAnAnswerAreLimited) {
  Start({.max_requests = 5});
  Submit(MakeGroup(1, 3));
  EXPECT_THAT(queue_->submit(MakeGroup(2, 3), &device_), FailsWith(ErrorCode::kLimit));
  Submit(MakeGroup(3, 2));
  const auto records = Read(3);
  EXPECT_THAT(queue_->submit(MakeGroup(4), &device_), FailsWith(ErrorCode::kLimit));
  ASSERT_THAT(Write({{records[0].cookie, 0}}), IsOk());
  Submit(MakeGroup(5, 3));
  EXPECT_EQ(queue_->detach(7), 2u);
  Submit(MakeGroup(6, 5));
  EXPECT_EQ(queue_->counters().refused, 2u);
  EXPECT_THAT(queue_->submit(FaultGroup(), &device_), FailsWith(ErrorCode::kInvalid));
}

TEST_F(FaultQueueTest, EachStepIsTimed) {
  Submit(MakeGroup(1));
  EXPECT_EQ(times_.of(FaultStep::kReport).count, 1u);
  EXPECT_EQ(times_.of(FaultStep::kQueue).count, 0u);
  const auto taken = queue_->take();
  ASSERT_TRUE(taken.has_value());
  EXPECT_EQ(taken->group.tag, 1u);
  EXPECT_EQ(times_.of(FaultStep::kQueue).count, 1u);
  EXPECT_EQ(times_.of(FaultStep::kResume).count, 0u);
  EXPECT_THAT(queue_->answer(taken->cookie, FaultAnswer::kFailure), IsOk());
  EXPECT_THAT(device_.of(1), ElementsAre(FaultAnswer::kFailure));
  EXPECT_EQ(times_.of(FaultStep::kResume).count, 1u);
  const auto queued = times_.of(FaultStep::kQueue);
  EXPECT_GT(queued.total_ns, 0u);
  EXPECT_EQ(queued.total_ns, queued.longest_ns);
}

// Devices, handlers and detaches at the same time: each accepted group has one answer.
TEST_F(FaultQueueTest, EveryAcceptedGroupIsAnsweredOnceWhateverHappens) {
  constexpr uint64_t kGroups = 2000;
  std::atomic<uint64_t> accepted{0};
  std::atomic<int> devices_left{2};
  std::vector<std::thread> threads;
  for (uint32_t device = 0; device < 2; ++device) {
    threads.emplace_back([&, device] {
      for (uint64_t i = 0; i < kGroups; ++i) {
        const uint64_t tag = device * kGroups + i;
        if (queue_->submit(MakeGroup(tag, 1 + i % 3, 0x1000, device), &device_)) ++accepted;
        if (i % 64 == 63) queue_->detach(device);
      }
      --devices_left;
    });
  }
  for (int handler = 0; handler < 2; ++handler) {
    threads.emplace_back([&] {
      while (devices_left.load() > 0) {
        if (const auto taken = queue_->take()) {
          static_cast<void>(queue_->answer(taken->cookie, FaultAnswer::kSuccess));
        } else {
          std::this_thread::yield();
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  queue_->close();
  EXPECT_EQ(device_.size(), accepted.load());
  EXPECT_FALSE(device_.any_twice());
  const auto counters = queue_->counters();
  EXPECT_EQ(counters.answered + counters.auto_answered, accepted.load());
}

}  // namespace
}  // namespace mvgpu::domain
