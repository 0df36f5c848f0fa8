#include "backend/policies/pinning_policy.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "backend/policies/policy_run.h"
#include "tests/backend/policies/trace_maker.h"
#include "tests/fakes/fake_pin_backend.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::backend {
namespace {

using testing::FailsWith;
using testing::FakePinBackend;
using testing::IsOk;
using testing::TraceMaker;

constexpr uint64_t kSecond = TraceMaker::kSecond;
constexpr uint64_t kMiB = 1 << 20;

// Counts every pin itself, and sees at the end that all are gone.
Result<PolicyFigures> RunChecked(std::string_view name, const DmaTrace& trace,
                                 uint64_t fail_at_call = 0) {
  const auto state = std::make_shared<FakePinBackend::State>();
  state->fail_at_call = fail_at_call;
  auto figures = RunPolicy(name, trace, std::make_unique<FakePinBackend>(state));
  EXPECT_TRUE(state->pages.empty()) << name;
  if (figures) {
    const uint64_t failed = fail_at_call == 0 ? 0 : 1;
    EXPECT_EQ(figures->pins.pin_calls, state->calls - failed) << name;
    EXPECT_EQ(figures->pins.pinned_pages, 0u) << name;
  }
  return figures;
}

// Two buffers of four pages that overlap by two, one of them used again; later a page elsewhere.
DmaTrace Story() {
  TraceMaker maker(64 * kMiB);
  const uint32_t first = maker.buffer({{0x100, 4}});
  const uint32_t second = maker.buffer({{0x102, 4}});
  const uint32_t third = maker.buffer({{0x1000, 1}});
  maker.use(0, first);
  maker.use(1 * kSecond, second);
  maker.unmap(2 * kSecond, first);
  maker.unmap(3 * kSecond, second);
  maker.use(4 * kSecond, first);
  maker.unmap(5 * kSecond, first);
  maker.use(200 * kSecond, third);
  maker.unmap(300 * kSecond, third);
  return maker.make();
}

struct Expected {
  std::string_view policy;
  uint64_t peak;
  uint64_t page_seconds;  // over 300 s
  uint64_t notifications;
  uint64_t pin_calls;
  uint64_t pages_pinned;
  uint64_t repinned;
};

class PolicyStoryTest : public ::testing::TestWithParam<Expected> {};

TEST_P(PolicyStoryTest, HasTheFiguresThatItsRulesSay) {
  const Expected& expected = GetParam();
  const auto figures = RunChecked(expected.policy, Story());
  ASSERT_THAT(figures, IsOk());
  EXPECT_EQ(figures->maps, 4u);
  EXPECT_EQ(figures->accesses, 4u);
  EXPECT_EQ(figures->duration_ns, 300 * kSecond);
  EXPECT_EQ(figures->pins.peak_pages, expected.peak);
  EXPECT_DOUBLE_EQ(figures->mean_pinned_pages(), static_cast<double>(expected.page_seconds) / 300);
  EXPECT_EQ(figures->notifications, expected.notifications);
  EXPECT_EQ(figures->pins.pin_calls, expected.pin_calls);
  EXPECT_EQ(figures->pins.pages_pinned, expected.pages_pinned);
  EXPECT_EQ(figures->pins.repinned_pages, expected.repinned);
}

INSTANTIATE_TEST_SUITE_P(
    Policies, PolicyStoryTest,
    ::testing::Values(Expected{"static", 16384, 300 * 16384, 0, 1, 16384, 0},
                      // Told of four maps and four unmaps; what is mapped is pinned.
                      Expected{"map-unmap", 6, 118, 8, 4, 11, 4},
                      Expected{"kvmgt", 6, 118, 8, 11, 11, 4},
                      // Scans at 60 and 120 s: what was used at first goes with the second.
                      Expected{"coiommu", 6, 4 + 119 * 6 + 100, 3, 7, 7, 0},
                      // 16 around each of two faults. What came since the last scan stays: those of
                      // the first go at 120 s.
                      Expected{"iopf", 16, 120 * 16 + 100 * 16, 2, 2, 32, 0},
                      Expected{"mvgpu", 6, 118, 4, 4, 11, 4},
                      Expected{"mvgpu-idle", 7, 4 + 199 * 6 + 100 * 7, 3, 3, 7, 0},
                      // An idle list of 64 pages, so a miss brings 8.
                      Expected{"mvgpu-ahead", 16, 200 * 8 + 100 * 16, 2, 2, 16, 0}),
    [](const auto& story) {
      std::string name(story.param.policy);
      std::replace(name.begin(), name.end(), '-', '_');
      return name;
    });

TEST(PinningPolicyTest, EveryPolicyHasAStory) { EXPECT_EQ(PolicyNames().size(), 8u); }

TEST(PinningPolicyTest, WarmUpIsCountedApart) {
  // The third buffer alone is after it.
  const auto figures =
      RunPolicy("map-unmap", Story(), domain::MakeNonePinBackend(), {std::chrono::seconds(100)});
  ASSERT_THAT(figures, IsOk());
  EXPECT_EQ(figures->warm_maps, 1u);
  EXPECT_EQ(figures->warm_notifications, 2u);
  EXPECT_DOUBLE_EQ(figures->suppressed_share(), -1);
  const auto coiommu =
      RunPolicy("coiommu", Story(), domain::MakeNonePinBackend(), {std::chrono::seconds(2)});
  ASSERT_THAT(coiommu, IsOk());
  EXPECT_EQ(coiommu->warm_maps, 2u);
  EXPECT_DOUBLE_EQ(coiommu->suppressed_share(), 0.5);
}

// What the guest has mapped, by the simplest means there are.
struct Naive {
  uint64_t peak = 0;
  double page_ns = 0;
};
Naive NaiveOf(const DmaTrace& trace) {
  Naive naive;
  std::map<uint64_t, int> users;
  uint64_t last = 0;
  for (const DmaEvent& event : trace.events) {
    naive.page_ns += static_cast<double>(users.size()) * static_cast<double>(event.time_ns - last);
    last = event.time_ns;
    if (event.kind == DmaEvent::Kind::kAccess) continue;
    for (const PageRun& part : trace.buffers[event.buffer].parts) {
      for (uint64_t page = part.first; page < part.end(); ++page) {
        if (event.kind == DmaEvent::Kind::kMap) {
          ++users[page];
        } else if (--users[page] == 0) {
          users.erase(page);
        }
      }
    }
    naive.peak = std::max<uint64_t>(naive.peak, users.size());
  }
  return naive;
}

// Buffers of one to three parts in 256 pages, so that most of them overlap, some with themselves.
DmaTrace RandomTrace(uint64_t seed) {
  std::mt19937_64 random(seed);
  const auto below = [&](uint64_t end) { return random() % end; };
  TraceMaker maker(16 * kMiB);
  std::vector<uint32_t> buffers;
  for (int i = 0; i < 20; ++i) {
    std::vector<PageRun> parts(1 + below(3));
    for (PageRun& part : parts) part = {0x400 + below(256), 1 + below(20)};
    buffers.push_back(maker.buffer(parts, static_cast<dma::Direction>(below(3))));
  }
  std::set<uint32_t> mapped;
  uint64_t now = 0;
  for (int i = 0; i < 300; ++i) {
    now += below(4 * kSecond);
    const uint32_t buffer = buffers[below(buffers.size())];
    if (mapped.insert(buffer).second) {
      maker.map(now, buffer);
    } else if (below(2) == 0) {
      maker.access(now, buffer);
    } else {
      maker.unmap(now, buffer);
      mapped.erase(buffer);
    }
  }
  return maker.make();
}

class PolicyRandomTest : public ::testing::TestWithParam<uint64_t> {};

TEST_P(PolicyRandomTest, PoliciesThatFollowTheGuestPinWhatIsMapped) {
  const DmaTrace trace = RandomTrace(GetParam());
  const Naive naive = NaiveOf(trace);
  for (const std::string_view name : {"map-unmap", "kvmgt", "mvgpu"}) {
    const auto figures = RunChecked(name, trace);
    ASSERT_THAT(figures, IsOk()) << name;
    EXPECT_EQ(figures->pins.peak_pages, naive.peak) << name;
    EXPECT_DOUBLE_EQ(figures->pins.page_ns, naive.page_ns) << name;
  }
}

// RunPolicy() has looked where the device ended up at each access.
TEST_P(PolicyRandomTest, TheOthersPinWhatTheDeviceNeeds) {
  const DmaTrace trace = RandomTrace(GetParam());
  for (const std::string_view name : {"static", "coiommu", "iopf", "mvgpu-idle", "mvgpu-ahead"}) {
    const auto figures = RunChecked(name, trace);
    ASSERT_THAT(figures, IsOk()) << name;
    EXPECT_GT(figures->accesses, 0u);
    EXPECT_LE(figures->pins.peak_pages, trace.memory_pages()) << name;
  }
}

TEST_P(PolicyRandomTest, APinThatFailsEndsTheRunAndLeavesNothing) {
  const DmaTrace trace = RandomTrace(GetParam());
  for (const std::string_view name : PolicyNames()) {
    // The window that a miss brings along may fail without harm: all of those calls must.
    const uint64_t call = name == "static" ? 1 : 3;
    const auto figures = RunChecked(name, trace, call);
    if (name == "mvgpu-ahead" || name == "iopf") continue;  // these do without neighbours
    EXPECT_THAT(figures, FailsWith(ErrorCode::kLimit)) << name;
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, PolicyRandomTest, ::testing::Range<uint64_t>(1, 6));

TEST(PinningPolicyTest, TheIdleListIsBounded) {
  TraceMaker maker(64 * kMiB);  // 64 idle pages
  for (uint64_t i = 0; i < 100; ++i) {
    const uint32_t buffer = maker.buffer({{0x100 + 8 * i, 8}});
    maker.use(i * kSecond, buffer);
    maker.unmap(i * kSecond, buffer);
  }
  const DmaTrace trace = maker.make();
  for (const std::string_view name : {"mvgpu-idle", "mvgpu-ahead"}) {
    const auto figures = RunChecked(name, trace);
    ASSERT_THAT(figures, IsOk());
    EXPECT_LE(figures->pins.peak_pages, 64u + 8u) << name;
    EXPECT_GE(figures->pins.peak_pages, 64u) << name;
  }
}

TEST(PinningPolicyTest, CoiommuAsksOncePerBatch) {
  TraceMaker maker(64 * kMiB);
  const uint32_t large = maker.buffer({{0x100, 4096}, {0x2000, 4096}});
  maker.use(0, large);
  const uint32_t single = maker.buffer({{0x3800, 1}});
  maker.use(0, single);
  const auto figures = RunChecked("coiommu", maker.make());
  ASSERT_THAT(figures, IsOk());
  EXPECT_EQ(figures->notifications, 3u);
  EXPECT_EQ(figures->pins.pages_pinned, 8193u);
}

TEST(PinningPolicyTest, APageMappedTooOftenIsRefusedByItsDriver) {
  TraceMaker maker(4 * kMiB);
  for (int i = 0; i < 0xffef + 1; ++i) maker.map(0, maker.buffer({{0x100, 1}}));
  EXPECT_THAT(RunChecked("coiommu", maker.make()), FailsWith(ErrorCode::kLimit));
}

TEST(PolicyNamesTest, AreCheckedAndListed) {
  const auto all = ParsePolicyNames("");
  ASSERT_THAT(all, IsOk());
  EXPECT_EQ(all->size(), PolicyNames().size());
  const auto some = ParsePolicyNames("iopf,static");
  ASSERT_THAT(some, IsOk());
  EXPECT_THAT(*some, ::testing::ElementsAre("iopf", "static"));
  const auto unknown = ParsePolicyNames("static,speculative");
  ASSERT_THAT(unknown, FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(unknown.error().message(), ::testing::HasSubstr("'speculative'"));
  EXPECT_THAT(unknown.error().message(), ::testing::HasSubstr("kvmgt, coiommu"));
  EXPECT_THAT(ParsePolicyNames("static,static"), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(ParsePolicyNames(","), FailsWith(ErrorCode::kInvalid));
}

}  // namespace
}  // namespace mvgpu::backend
