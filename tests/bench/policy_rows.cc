// Pinning policies on the pattern that coIOMMU's authors publish. These figures are counts: the
// same on each machine.

#include "backend/policies/policy_run.h"

#include <memory>
#include <string_view>

#include "backend/policies/workloads.h"
#include "tests/bench/seeds_table.h"

namespace mvgpu::bench {

namespace {

using backend::PolicyFigures;

// Two scans of coIOMMU, a minute apart.
constexpr std::chrono::seconds kWarmUp{120};
constexpr std::string_view kOurs = "mvgpu-ahead";

// Plays the pattern to a policy when its figures are first asked for.
class Played {
 public:
  Played(const backend::DmaTrace* trace, std::string_view policy)
      : figures_(backend::RunPolicy(policy, *trace, domain::MakeNonePinBackend(), {kWarmUp})) {
    MVGPU_CHECK(figures_.has_value());
  }
  const PolicyFigures& figures() const { return *figures_; }

 private:
  const Result<PolicyFigures> figures_;
};

double Percent(double part, double whole) { return 100 * part / whole; }

}  // namespace

void MeasurePolicies(Table* table) {
  const backend::PublishedWorkload workload{.seconds = table->settings().work(600)};
  Lazy<backend::DmaTrace> trace([&] {
    auto made = backend::MakePublishedWorkload(workload);
    MVGPU_CHECK(made.has_value());
    return std::make_unique<backend::DmaTrace>(*std::move(made));
  });
  Lazy<Played> theirs([&] { return std::make_unique<Played>(&trace.get(), "coiommu"); });
  Lazy<Played> ours([&] { return std::make_unique<Played>(&trace.get(), kOurs); });
  const auto suppressed = [](Lazy<Played>& played) -> Result<double> {
    return 100 * played.get().figures().suppressed_share();
  };
  const auto peak = [&](Lazy<Played>& played) -> Result<double> {
    return Percent(static_cast<double>(played.get().figures().pins.peak_pages),
                   static_cast<double>(trace.get().memory_pages()));
  };
  table->measure("maps that tell nobody, published pattern, coiommu", "%", "of maps after warm-up",
                 Target::AtLeast(99), [&] { return suppressed(theirs); });
  table->measure("maps that tell nobody, published pattern, mvgpu-ahead", "%",
                 "of maps after warm-up", Target::AtLeast(99), [&] { return suppressed(ours); });
  table->measure("peak pinned, published pattern, coiommu", "%", "of 32 GiB", {},
                 [&] { return peak(theirs); });
  table->measure("peak pinned, published pattern, mvgpu-ahead", "%", "of 32 GiB",
                 Target::AtMost(0.5), [&] { return peak(ours); });
  table->measure("notifications, published pattern, mvgpu-ahead", "x", "those of coiommu",
                 Target::AtMost(1), [&]() -> Result<double> {
                   return static_cast<double>(ours.get().figures().notifications) /
                          static_cast<double>(theirs.get().figures().notifications);
                 });
}

}  // namespace mvgpu::bench
