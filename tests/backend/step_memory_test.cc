#include "backend/step_memory.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/fakes/fake_remote_memory.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::backend {
namespace {

using testing::FailsWith;
using testing::IsOk;

constexpr uint64_t kStart = 0x10000;

// A VMM that keeps a list of what it was asked.
class AskedVmm final : public domain::RemoteMemory {
 public:
  Result<void> read(Iova iova, std::span<std::byte> destination) override {
    asked.push_back("read " + std::to_string(iova.value() - kStart));
    return bytes.read(iova, destination);
  }
  Result<void> write(Iova iova, std::span<const std::byte> source) override {
    asked.push_back("write " + std::to_string(iova.value() - kStart));
    return over ? Fail(ErrorCode::kProtocol, "gone") : bytes.write(iova, source);
  }
  testing::FakeRemoteMemory bytes{Iova(kStart), 1 << 16};
  std::vector<std::string> asked;
  bool over = false;
};

class StepMemoryTest : public ::testing::Test {
 protected:
  StepMemoryTest() {
    for (size_t i = 0; i < vmm_.bytes.bytes().size(); ++i) {
      vmm_.bytes.bytes()[i] = static_cast<std::byte>(i * 7 + 1);
    }
  }
  // Four bytes; the first one is `value_` when they are there.
  Result<void> Read(uint64_t offset) {
    std::byte word[4];
    MVGPU_RETURN_IF_ERROR(memory_.read(Iova(kStart + offset), word));
    value_ = static_cast<uint8_t>(word[0]);
    return {};
  }
  static uint8_t ByteAt(uint64_t offset) { return static_cast<uint8_t>(offset * 7 + 1); }
  void ExpectPending(uint64_t offset) { EXPECT_THAT(Read(offset), FailsWith(ErrorCode::kPending)); }
  void ExpectHere(uint64_t offset) {
    EXPECT_THAT(Read(offset), IsOk());
    EXPECT_EQ(value_, ByteAt(offset));
  }
  Result<void> Write(uint64_t offset) {
    const std::byte word[4] = {};
    return memory_.write(Iova(kStart + offset), word);
  }
  Result<void> Exchange() {
    auto exchange = memory_.take();
    exchange.run(vmm_);
    return memory_.put(std::move(exchange));
  }

  StepMemory memory_;
  AskedVmm vmm_;
  uint8_t value_ = 0;
};

TEST_F(StepMemoryTest, AnAttemptFindsWhatTheOneBeforeAskedFor) {
  memory_.begin_attempt();
  ExpectPending(100);
  ASSERT_THAT(Exchange(), IsOk());
  memory_.begin_attempt();
  ExpectHere(100);
  ExpectPending(200);
  ASSERT_THAT(Exchange(), IsOk());
  memory_.begin_attempt();
  ExpectHere(100);
  ExpectHere(200);
  EXPECT_THAT(vmm_.asked, ::testing::ElementsAre("read 100", "read 200"));
}

TEST_F(StepMemoryTest, EverythingThatAnAttemptMissesIsFetchedAtOnce) {
  memory_.begin_attempt();
  ExpectPending(100);
  ExpectPending(300);
  ExpectPending(200);
  ASSERT_THAT(Exchange(), IsOk());
  memory_.begin_attempt();
  ExpectHere(100);
  ExpectHere(300);
  ExpectHere(200);
}

TEST_F(StepMemoryTest, TheSameWordReadTwiceIsAskedForTwice) {
  memory_.begin_attempt();
  ExpectPending(100);
  ASSERT_THAT(Exchange(), IsOk());
  memory_.begin_attempt();
  ExpectHere(100);
  ExpectPending(100);
  ASSERT_THAT(Exchange(), IsOk());
  EXPECT_EQ(vmm_.asked.size(), 2u) << "it may have changed in between";
}

TEST_F(StepMemoryTest, AnAttemptThatGoesAnotherWayForgetsTheRest) {
  memory_.begin_attempt();
  ExpectPending(100);
  ExpectPending(200);
  ExpectPending(300);
  ASSERT_THAT(Exchange(), IsOk());
  memory_.begin_attempt();
  ExpectHere(100);
  ExpectPending(204);
  ASSERT_THAT(Exchange(), IsOk());
  memory_.begin_attempt();
  ExpectHere(100);
  ExpectHere(204);
  ExpectPending(300);
}

TEST_F(StepMemoryTest, AnotherSizeIsAnotherRead) {
  memory_.begin_attempt();
  ExpectPending(100);
  ASSERT_THAT(Exchange(), IsOk());
  memory_.begin_attempt();
  std::byte half[2];
  EXPECT_THAT(memory_.read(Iova(kStart + 100), half), FailsWith(ErrorCode::kPending));
}

TEST_F(StepMemoryTest, TheNextStepReadsAnew) {
  memory_.begin_attempt();
  ExpectPending(100);
  ASSERT_THAT(Exchange(), IsOk());
  memory_.begin_attempt();
  ExpectHere(100);
  memory_.forget_reads();
  memory_.begin_attempt();
  ExpectPending(100);
}

TEST_F(StepMemoryTest, WhatWasFetchedWhileMemoryChangedIsNotUsed) {
  memory_.begin_attempt();
  ExpectPending(100);
  auto exchange = memory_.take();
  exchange.run(vmm_);
  memory_.forget_reads();  // the VMM maps something
  ASSERT_THAT(memory_.put(std::move(exchange)), IsOk());
  memory_.begin_attempt();
  ExpectPending(100);
}

TEST_F(StepMemoryTest, ARefusalIsTheResultOfTheReadItBelongsTo) {
  vmm_.bytes.refuse_from_call(2);
  memory_.begin_attempt();
  ExpectPending(100);
  ExpectPending(200);
  ExpectPending(300);
  ASSERT_THAT(Exchange(), IsOk());
  EXPECT_EQ(vmm_.asked.size(), 2u) << "the step will not get further";
  memory_.begin_attempt();
  ExpectHere(100);
  EXPECT_THAT(Read(200), FailsWith(ErrorCode::kNotReachable));
  ExpectPending(300);
}

TEST_F(StepMemoryTest, WritesGoOutInTheirOrderAndBeforeTheReadsBehindThem) {
  memory_.begin_attempt();
  EXPECT_THAT(Write(100), IsOk());
  EXPECT_THAT(Write(200), IsOk());
  ExpectPending(100);
  ASSERT_THAT(Exchange(), IsOk());
  EXPECT_EQ(memory_.next_write()->start(), Iova(kStart + 200));
  ASSERT_THAT(Exchange(), IsOk());
  EXPECT_FALSE(memory_.next_write().has_value());
  ASSERT_THAT(Exchange(), IsOk());
  EXPECT_THAT(vmm_.asked, ::testing::ElementsAre("write 100", "write 200", "read 100"));
  memory_.begin_attempt();
  EXPECT_THAT(Read(100), IsOk());
  EXPECT_EQ(value_, 0) << "what was written";
}

TEST_F(StepMemoryTest, AChangeOfMemoryLeavesWritesAndAResetDoesNot) {
  EXPECT_THAT(Write(100), IsOk());
  memory_.forget_reads();
  EXPECT_TRUE(memory_.next_write().has_value());
  memory_.forget_everything();
  EXPECT_FALSE(memory_.next_write().has_value());
}

TEST_F(StepMemoryTest, ARefusedWriteIsAnErrorUnlessTheDriverHasResetSince) {
  vmm_.bytes.refuse_from_call(1);
  EXPECT_THAT(Write(100), IsOk());
  EXPECT_THAT(Exchange(), FailsWith(ErrorCode::kNotReachable));
  EXPECT_THAT(Write(100), IsOk());
  auto exchange = memory_.take();
  exchange.run(vmm_);
  memory_.forget_everything();
  EXPECT_THAT(memory_.put(std::move(exchange)), IsOk());
}

TEST_F(StepMemoryTest, AWriteThatWasRefusedWhileMemoryChangedGoesOutAgain) {
  EXPECT_THAT(Write(100), IsOk());
  EXPECT_THAT(Write(200), IsOk());
  auto exchange = memory_.take();
  vmm_.bytes.refuse_from_call(1);
  exchange.run(vmm_);
  memory_.forget_reads();  // the VMM unmaps it and maps it again
  ASSERT_THAT(memory_.put(std::move(exchange)), IsOk());
  vmm_.bytes.refuse_from_call(0);
  ASSERT_THAT(Exchange(), IsOk());
  ASSERT_THAT(Exchange(), IsOk());
  EXPECT_THAT(vmm_.asked, ::testing::ElementsAre("write 100", "write 100", "write 200"));
}

TEST_F(StepMemoryTest, AVmmThatHasGoneEndsTheStep) {
  vmm_.over = true;
  EXPECT_THAT(Write(100), IsOk());
  auto exchange = memory_.take();
  exchange.run(vmm_);
  memory_.forget_everything();
  EXPECT_THAT(memory_.put(std::move(exchange)), FailsWith(ErrorCode::kProtocol));
}

TEST_F(StepMemoryTest, AStepKeepsNoMoreThanItsLimit) {
  std::vector<std::byte> large(StepMemory::kMaxStepBytes / 2);
  memory_.begin_attempt();
  EXPECT_THAT(memory_.read(Iova(kStart), large), FailsWith(ErrorCode::kPending));
  EXPECT_THAT(memory_.read(Iova(kStart), large), FailsWith(ErrorCode::kPending));
  EXPECT_THAT(Read(0), FailsWith(ErrorCode::kLimit));
  memory_.begin_attempt();
  ExpectPending(0);
}

}  // namespace
}  // namespace mvgpu::backend
