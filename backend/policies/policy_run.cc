#include "backend/policies/policy_run.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

namespace mvgpu::backend {

namespace {

using Clock = std::chrono::steady_clock;

constexpr uint64_t kPeriodNs = std::chrono::nanoseconds(PinningPolicy::kPeriod).count();

class Run {
 public:
  Run(PolicyGuest* guest, PinningPolicy* policy, PolicyRunOptions options)
      : guest_(*guest),
        policy_(*policy),
        warm_up_ns_(static_cast<uint64_t>(std::chrono::nanoseconds(options.warm_up).count())) {}

  Result<PolicyFigures> play() {
    MVGPU_RETURN_IF_ERROR(policy_.begin());
    for (const DmaEvent& event : guest_.trace().events) MVGPU_RETURN_IF_ERROR(Play(event));
    figures_.duration_ns = guest_.trace().events.empty() ? 0 : guest_.trace().events.back().time_ns;
    figures_.notifications = policy_.notifications();
    figures_.warm_maps = figures_.maps - cold_maps_;
    figures_.warm_notifications = figures_.notifications - cold_notifications_;
    TakeTimes();
    return figures_;
  }

 private:
  Result<void> Play(const DmaEvent& event) {
    for (; next_tick_ns_ <= event.time_ns; next_tick_ns_ += kPeriodNs) {
      guest_.backend().set_time(next_tick_ns_);
      Timed([&] { policy_.tick(); });
    }
    guest_.backend().set_time(event.time_ns);
    const DmaBuffer& buffer = guest_.trace().buffers[event.buffer];
    Result<void> done;
    switch (event.kind) {
      case DmaEvent::Kind::kMap:
        ++figures_.maps;
        Timed([&] { done = policy_.map(event.buffer, buffer); });
        break;
      case DmaEvent::Kind::kUnmap:
        Timed([&] { done = policy_.unmap(event.buffer, buffer); });
        break;
      case DmaEvent::Kind::kAccess:
        done = Access(event, buffer);
        break;
    }
    if (event.time_ns < warm_up_ns_) {
      cold_maps_ = figures_.maps;
      cold_notifications_ = policy_.notifications();
    }
    return done;
  }

  Result<void> Access(const DmaEvent& event, const DmaBuffer& buffer) {
    const domain::Access access = dma::AccessFor(buffer.direction);
    const std::vector<PageRun> pages = buffer.slice(event.first, event.count);
    Result<void> done;
    Timed([&] { done = policy_.access(pages, access); });
    MVGPU_RETURN_IF_ERROR(std::move(done));
    ++figures_.accesses;
    times_.push_back(std::exchange(since_access_ns_, 0));
    for (const PageRun& run : pages) {
      for (uint64_t page = run.first; page < run.end(); ++page) {
        MVGPU_RETURN_IF_ERROR(Look(Iova(BytesIn(page)), access));
      }
    }
    return {};
  }
  // The device is where the guest's memory is.
  Result<void> Look(Iova page, domain::Access access) {
    const std::byte* meant =
        domain::ApiOnlyDomain::Translator(guest_.domain()).translate(page, access);
    const std::byte* reached = policy_.reach(page, access);
    if (reached != nullptr && reached == meant) return {};
    return Fail(ErrorCode::kNotReachable,
                fmt::format("the device {} at guest-physical {:#x}",
                            reached == nullptr ? "faults" : "is at another page", page.value()));
  }

  template <typename Work>
  void Timed(Work work) {
    const auto start = Clock::now();
    work();
    since_access_ns_ += static_cast<uint64_t>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start).count());
  }
  void TakeTimes() {
    if (times_.empty()) return;
    figures_.mean_access_ns =
        std::accumulate(times_.begin(), times_.end(), 0.0) / static_cast<double>(times_.size());
    const auto p99 = times_.begin() + static_cast<std::ptrdiff_t>((times_.size() - 1) * 99 / 100);
    std::nth_element(times_.begin(), p99, times_.end());
    figures_.p99_access_ns = *p99;
  }

  PolicyGuest& guest_;  // these two outlive this, see RunPolicy()
  PinningPolicy& policy_;
  const uint64_t warm_up_ns_;
  uint64_t next_tick_ns_ = kPeriodNs;
  uint64_t cold_maps_ = 0;
  uint64_t cold_notifications_ = 0;
  uint64_t since_access_ns_ = 0;
  std::vector<uint64_t> times_;  // of accesses
  PolicyFigures figures_;        // without the pins
};

}  // namespace

double PolicyFigures::mean_pinned_pages() const {
  if (duration_ns == 0) return static_cast<double>(pins.peak_pages);
  return pins.page_ns / static_cast<double>(duration_ns);
}

double PolicyFigures::suppressed_share() const {
  if (warm_maps == 0) return 1;
  return 1 - static_cast<double>(warm_notifications) / static_cast<double>(warm_maps);
}

Result<PolicyFigures> RunPolicy(std::string_view name, const DmaTrace& trace,
                                std::unique_ptr<domain::PinBackend> backend,
                                PolicyRunOptions options) {
  MVGPU_ASSIGN_OR_RETURN(const std::unique_ptr<PolicyGuest> guest,
                         PolicyGuest::Create(trace, std::move(backend)));
  Result<PolicyFigures> figures = [&] {
    const auto policy = MakePolicy(name, guest.get());
    return Run(guest.get(), policy.get(), options).play();
  }();
  if (!figures) return figures;
  figures->pins = guest->pins();
  if (figures->pins.pinned_pages == 0) return figures;
  return Fail(ErrorCode::kBusy, fmt::format("{} pages are pinned still when everything has gone",
                                            figures->pins.pinned_pages));
}

}  // namespace mvgpu::backend
