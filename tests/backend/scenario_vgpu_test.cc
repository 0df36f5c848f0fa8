// The commands of scenarios for a vGPU behind the guest's IOMMU, beside what vgpu-svm.scenario
// shows.

#include "backend/scenario/world.h"
#include "tests/backend/scenario_fixture.h"

namespace mvgpu::testing {
namespace {

using backend::PinMode;
using backend::scenario::Outcome;
using backend::scenario::RunSteps;

// Runs lines that are to go as they expect.
void ExpectGood(const std::string& lines) {
  const auto steps = Parse(Scenario(lines));
  ASSERT_TRUE(steps) << steps.error().message();
  const Outcome outcome = RunSteps(*steps, PinMode::kNone);
  EXPECT_TRUE(outcome.left.is_nothing());
  if (outcome.failure) {
    ADD_FAILURE() << outcome.steps.back().text << ": expected " << outcome.failure->expected
                  << ", got " << outcome.failure->got;
  }
}

// An IOMMU that translates, and a driver that works. Page 0 of the process 0x345 leads to 0x100000,
// by a first stage alone; nothing is behind it.
std::string Booted(const std::string& page_requests) {
  return "memory 4M\nvgpu 0x3a91 0x345 " + page_requests +
         " page-requests\nvgpu-map 0 4M at 0 rw\nexpect gpu-boot 0x10000 = driver-ok\n"
         "write64 0x13a8 0x2001\nwrite64 0x2220 0x200e1d\nwrite64 0x200068 0x210001\n"
         "write64 0x210140 0x41 0x42 0x220000\nvtd-tables 0x230000\n"
         "vtd-first-stage 0x220000 map 0 0x100000 rw\nvtd-root 0x1400\nvtd-queue 0x5000\n"
         "vtd-page-queue 0xa000\nvtd-translation on\nexpect gpu-create 1 16 16 = ok\n";
}

TEST(ScenarioVgpu, OrderIsWhatMakesItAnErrorOfTheScenario) {
  for (const char* command :
       {"vgpu-map 0 4K at 0 rw", "vgpu-unmap 0 4K", "vgpu-addresses", "vgpu-figure pinned",
        "gpu-boot 0", "gpu-create 1 16 16", "gpu-attach 1 0 4K", "gpu-detach 1", "gpu-unref 1",
        "gpu-scanout 1 16 16", "gpu-transfer 1 16 16", "gpu-flush 1 16 16", "gpu-answer",
        "gpu-pixel 0 0", "gpu-picture"}) {
    ExpectGood("memory 1M\nexpect " + std::string(command) + " = error invalid");
  }
  ExpectGood(
      "expect vgpu 1 2 with page-requests = error invalid\nmemory 1M\nvtd-unit 1\n"
      "expect vgpu 1 2 with page-requests = error invalid\n"
      "expect vgpu-addresses = error invalid");
  ExpectGood(
      "memory 1M\nexpect vgpu 0x10000 2 with page-requests = error invalid\n"
      "expect vgpu 1 0x100000 with page-requests = error invalid\n"
      "expect vgpu 1 2 with page-requests = bypassed\n"
      "expect vgpu 1 2 with page-requests = error invalid\nexpect vtd-unit 1 = error invalid\n"
      "expect gpu-create 1 16 16 = error invalid\nexpect gpu-answer = error invalid");
}

TEST(ScenarioVgpu, RingsAreWholePagesOfMemory) {
  const std::string lines = "memory 1M\nvgpu 1 2 with page-requests\nvgpu-map 0 1M at 0 rw\n";
  ExpectGood(lines +
             "expect gpu-boot 0x10010 = error invalid\nexpect gpu-create 1 16 16 = error invalid\n"
             "expect gpu-boot 0xff000 = error invalid\nexpect gpu-boot 0xfe000 = driver-ok\n"
             "expect gpu-create 1 16 16 = ok\nexpect vgpu-figure commands = 1");
}

TEST(ScenarioVgpu, AnswersAreTheDevices) {
  ExpectGood(Booted("without") +
             "expect gpu-create 1 16 16 = refused resource-id\n"
             "expect gpu-create 2 0 16 = refused parameter\n"
             "expect gpu-create 2 4096 4096 = refused out-of-memory\n"
             "expect gpu-create 0x100000002 16 16 = error invalid\n"
             "expect gpu-transfer 1 16 16 = refused unspec\n"
             "expect gpu-attach 1 0 1K = ok\nexpect vgpu-figure pinned = 1\n"
             "expect gpu-scanout 7 16 16 = refused resource-id\n"
             "expect gpu-detach 1 = ok\nexpect vgpu-figure pinned = 0\n"
             "expect gpu-attach 1 0 1K = ok\nexpect gpu-unref 1 = ok\n"
             "expect vgpu-figure pinned = 0\nexpect gpu-unref 1 = refused resource-id\n"
             "expect gpu-answer = nothing\nexpect gpu-picture = none\nexpect gpu-pixel 0 0 = none");
}

// Memory of the rings that goes is waited for; that may not be written is an error of the guest's,
// which its next driver does not have.
TEST(ScenarioVgpu, AStoppedQueueIsAnErrorUntilTheNextBoot) {
  ExpectGood(Booted("without") +
             "vgpu-unmap 0 4M\nexpect gpu-create 2 16 16 = waiting\n"
             "expect gpu-create 3 16 16 = error busy\nexpect gpu-answer = waiting\n"
             "vgpu-map 0 4M at 0 rw\nexpect gpu-answer = ok\n"
             "vgpu-unmap 0 4M\nvgpu-map 0 4M at 0 r\n"
             "expect gpu-create 3 16 16 = error permission\nexpect gpu-answer = error permission\n"
             "vgpu-unmap 0 4M\nvgpu-map 0 4M at 0 rw\nexpect gpu-boot 0x20000 = driver-ok\n"
             "expect gpu-create 1 16 16 = ok\nexpect vgpu-figure pinned = 0");
}

TEST(ScenarioVgpu, WithoutPageRequestsAFaultIsAnErrorAtOnce) {
  ExpectGood(Booted("without") +
             "expect gpu-attach 1 0x1000 1K = refused unspec\nexpect vtd-page-entries = 0\n"
             "expect vtd fault-events = 1\nexpect vtd-fault 0 = 0x1000 0xc003457180003a91\n"
             "expect vgpu-figure translated = 0");
  ExpectGood(Booted("with") +
             "expect gpu-attach 1 0x1000 1K = waiting\nexpect vtd-page-entries = 1\n"
             "expect vtd fault-events = 0");
}

// A driver that resets while its request waits for a page.
TEST(ScenarioVgpu, ABootEndsAWait) {
  ExpectGood(Booted("with") +
             "expect gpu-attach 1 0x1000 1K = waiting\nexpect gpu-boot 0x20000 = driver-ok\n"
             "expect gpu-answer = nothing\nexpect gpu-create 1 16 16 = ok\n"
             "expect gpu-attach 1 0 1K = ok\nexpect vgpu-figure pinned = 1");
}

TEST(ScenarioVgpu, DescriptorsAreDoneWhenTheyAreGivenTime) {
  ExpectGood(Booted("without") +
             "expect vtd-run 9 = done\nvtd-post 0x37 0\nvtd-post 0x100000025 0x9000\n"
             "expect vtd-run 0 = head 0 tail 0x40\nexpect vtd-run 1 = head 0x20 tail 0x40\n"
             "expect read64 0x9000 = 0\nexpect vtd-run 9 = done\nexpect read64 0x9000 = 1\n"
             "vtd-post 0xff0 0\nvtd-post 0x37 0\nexpect vtd-run 9 = stopped code 3");
}

// The page requests that a scenario makes itself, at the IOMMU that the vGPU owns.
TEST(ScenarioVgpu, OthersMayAskForPagesToo) {
  ExpectGood(Booted("with") +
             "expect vtd-page-request 0x3a91 0x345 0x3000 5 rw = asked\n"
             "expect vtd-page-entries = 1\nexpect vtd-answers = nothing\n"
             "expect vtd-invalidate 0x3453a910019 0x2c = done\n"
             "expect vtd-answers = group 5 code 0\n"
             "vtd-page-request 0x3a91 0x345 0x3000 6 rw");
}

// A part that could not take back what it did.
struct Stubborn final : backend::scenario::World::Part {
  static constexpr auto kSlot = backend::scenario::World::Slot::kVgpu;
  static constexpr std::string_view kMaker = "stubborn";
  backend::scenario::World::Left end() override { return {1, 2, 3, 4}; }
};

// What is not the guest's own domain's is counted, too.
TEST(ScenarioVgpu, WhatAPartCouldNotTakeBackIsSeen) {
  using backend::scenario::World;
  World world(PinMode::kNone);
  ASSERT_TRUE(world.make_memory(1 << 20));
  ASSERT_TRUE(world.add(std::make_unique<Stubborn>()));
  const World::Left left = world.end();
  EXPECT_EQ(left.pinned_pages, 1u);
  EXPECT_EQ(left.locked_pages, 2u);
  EXPECT_EQ(left.charged_pages, 3u);
  EXPECT_EQ(left.mappings, 4u);
  EXPECT_TRUE(world.end().is_nothing());
}

}  // namespace
}  // namespace mvgpu::testing
