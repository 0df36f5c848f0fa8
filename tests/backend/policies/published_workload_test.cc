// The pattern that coIOMMU's authors publish: 32 GiB, of which coIOMMU pins 174 MB at most.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string_view>

#include "backend/policies/policy_run.h"
#include "backend/policies/workloads.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::backend {
namespace {

using testing::FailsWith;
using testing::IsOk;

constexpr uint64_t kSeconds = 300;
constexpr std::chrono::seconds kWarmUp{120};

class PublishedWorkloadTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    auto trace = MakePublishedWorkload({.seconds = kSeconds});
    ASSERT_THAT(trace, IsOk());
    trace_ = new DmaTrace(*std::move(trace));
  }
  static void TearDownTestSuite() { delete std::exchange(trace_, nullptr); }

  static PolicyFigures Played(std::string_view policy) {
    auto figures = RunPolicy(policy, *trace_, domain::MakeNonePinBackend(), {kWarmUp});
    EXPECT_THAT(figures, IsOk()) << policy;
    return figures ? *figures : PolicyFigures();
  }
  static double PeakShare(const PolicyFigures& figures) {
    return static_cast<double>(figures.pins.peak_pages) /
           static_cast<double>(trace_->memory_pages());
  }
  static inline DmaTrace* trace_ = nullptr;
};

TEST_F(PublishedWorkloadTest, CoiommuPinsAndAsksAsItsAuthorsSay) {
  const PolicyFigures coiommu = Played("coiommu");
  EXPECT_NEAR(static_cast<double>(BytesIn(coiommu.pins.peak_pages)), 174e6, 4e6);
  EXPECT_GE(coiommu.suppressed_share(), 0.99);
  // Most of what it asks for is new each time.
  EXPECT_GT(coiommu.warm_notifications, 0u);
}

TEST_F(PublishedWorkloadTest, OursPinsNoMoreThanTheyReportAndNotifiesLess) {
  const PolicyFigures coiommu = Played("coiommu");
  const PolicyFigures ours = Played("mvgpu-ahead");
  EXPECT_LE(PeakShare(ours), 0.005);
  EXPECT_LT(ours.pins.peak_pages, coiommu.pins.peak_pages);
  EXPECT_LT(ours.notifications, coiommu.notifications / 4);
  EXPECT_LT(ours.warm_notifications, coiommu.warm_notifications / 2);
  EXPECT_GE(ours.suppressed_share(), 0.99);
  EXPECT_LT(ours.pins.pin_calls, coiommu.pins.pin_calls);
}

TEST_F(PublishedWorkloadTest, AnIdleListAloneStaysBelowTheirsToo) {
  const PolicyFigures idle = Played("mvgpu-idle");
  EXPECT_LE(PeakShare(idle), 0.005);
  EXPECT_GE(idle.suppressed_share(), 0.99);
}

TEST_F(PublishedWorkloadTest, IsTheSameForTheSameSeed) {
  const auto once = MakePublishedWorkload({.seconds = 10});
  const auto again = MakePublishedWorkload({.seconds = 10});
  const auto other = MakePublishedWorkload({.seconds = 10, .seed = 2});
  ASSERT_THAT(once, IsOk());
  ASSERT_THAT(again, IsOk());
  ASSERT_THAT(other, IsOk());
  const auto buffers_of = [](const DmaTrace& trace) {
    std::vector<uint32_t> buffers;
    for (const DmaEvent& event : trace.events) buffers.push_back(event.buffer);
    return buffers;
  };
  EXPECT_EQ(buffers_of(*once), buffers_of(*again));
  EXPECT_NE(buffers_of(*once), buffers_of(*other));
  EXPECT_EQ(once->memory_pages(), PagesIn(uint64_t{32} << 30));
}

TEST_F(PublishedWorkloadTest, RefusesMemoryAndTimesThatItCannotUse) {
  EXPECT_THAT(MakePublishedWorkload({.memory = (uint64_t{2} << 30) - 4096}),
              FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(MakePublishedWorkload({.memory = (uint64_t{2} << 30) + 1}),
              FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(MakePublishedWorkload({.memory = uint64_t{1} << 50}), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(MakePublishedWorkload({.seconds = UINT64_MAX}), FailsWith(ErrorCode::kInvalid));
  // The disk's part comes to the end of memory, and begins again.
  EXPECT_THAT(MakePublishedWorkload({.memory = uint64_t{2} << 30, .seconds = 1500}), IsOk());
}

}  // namespace
}  // namespace mvgpu::backend
