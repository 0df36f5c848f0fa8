// I/O page faults: from the fault to the page that the device reaches, against the pin alone.

#include <fmt/format.h>

#include <memory>
#include <utility>
#include <vector>

#include "apionly-domain/assigned/device_target.h"
#include "apionly-domain/assigned/software_iommu.h"
#include "apionly-domain/faults/fault_queue.h"
#include "apionly-domain/faults/fault_router.h"
#include "apionly-domain/faults/fault_times.h"
#include "apionly-domain/faults/faulting_domain.h"
#include "tests/bench/baselines/bare_calls.h"
#include "tests/bench/bench_guest.h"
#include "tests/bench/seeds_table.h"

namespace mvgpu::bench {

namespace {

using domain::Access;

// A device behind an IOMMU in software, in front of memory that is mapped on demand. What it faults
// in are stretches that are far from each other, so that each fault is the first of its window.
class DemandMapped {
 public:
  DemandMapped(const Settings& settings, std::unique_ptr<domain::PinBackend> backend,
               uint64_t around)
      : guest_(Layout::OneMapping(settings.memory), std::move(backend)),
        space_(std::make_unique<domain::SoftwareIommu>(), {}),
        target_(&space_),
        faulting_({.around_pages = around}, {&guest_.domain(), &target_, nullptr}),
        pages_(around) {
    MVGPU_CHECK(guest_.container().attach(&faulting_).has_value());
    const uint64_t count = settings.work(128 << 10) / (around + 63);
    const uint64_t windows = guest_.pages().count() / around;
    for (uint64_t i = 0; i < count; ++i) {
      const uint64_t window = i * kStride % count * (windows / count);
      // Below 0xfee00000 and 16 MiB around it there is no window of ours on either side.
      const Iova first = guest_.pages().iova(window * around);
      if (first >= Iova(0xfe00'0000) && first < Iova(0x1'0000'0000)) continue;
      firsts_.push_back(first);
      guest_.touch(first, around);
      hosts_.push_back(guest_.host(first));
    }
  }
  ~DemandMapped() { MVGPU_CHECK(guest_.container().detach(&faulting_).has_value()); }

  size_t count() const { return firsts_.size(); }
  uint64_t bytes() const { return BytesIn(pages_); }
  const std::vector<std::byte*>& hosts() const { return hosts_; }
  // Each window comes by a fault, and is given back.
  void fault_all() {
    for (const Iova first : firsts_) {
      MVGPU_CHECK(faulting_.fault(first, Access::kReadWrite)->pages == pages_);
      MVGPU_CHECK(faulting_.invalidate(IovaRange::FromFirstAndLast(first, first + (bytes() - 1))) ==
                  pages_);
    }
  }

 private:
  static constexpr uint64_t kStride = 7919;  // a prime: visits each once

  Guest guest_;
  domain::AssignedSpace space_;
  domain::SpaceTarget target_;
  domain::FaultingDomain faulting_;
  const uint64_t pages_;
  std::vector<Iova> firsts_;
  std::vector<std::byte*> hosts_;
};

Result<Comparison> AgainstThePin(const Settings& settings, uint64_t around) {
  MVGPU_ASSIGN_OR_RETURN(auto backend, domain::MakeIoUringPinBackend());
  MVGPU_ASSIGN_OR_RETURN(auto made, BareBuffers::Create());
  const std::shared_ptr<BareBuffers> bare = std::move(made);
  const auto subject = std::make_shared<DemandMapped>(settings, std::move(backend), around);
  return Comparison{Timed(subject->count(), [subject](uint64_t) { subject->fault_all(); }),
                    Timed(subject->count(), [subject, bare](uint64_t) {
                      for (std::byte* host : subject->hosts()) {
                        bare->pin_and_release(host, subject->bytes());
                      }
                    })};
}

// The whole way of a fault, in one thread: a device raises it, a handler takes it off a queue,
// pins, maps, answers; what came is given back.
class SteppedFaults final : private domain::FaultSource {
 public:
  SteppedFaults(const Settings& settings, std::unique_ptr<domain::PinBackend> backend)
      : guest_(Layout::OneMapping(settings.memory), std::move(backend)),
        space_(std::make_unique<domain::SoftwareIommu>(), {}),
        target_(&space_),
        faulting_({}, {&guest_.domain(), &target_, &times_}),
        queue_(*domain::FaultQueue::Create({}, &times_)),
        router_({queue_.get(), &faulting_, nullptr, nullptr}) {
    MVGPU_CHECK(guest_.container().attach(&faulting_).has_value());
    for (const Iova page : guest_.pages().random(settings.work(4096), /*seed=*/1)) {
      if (page >= Iova(0xfee0'0000) && page < Iova(0xfef0'0000)) continue;  // no memory on a PC
      guest_.touch(page, 1);
      Fault(page);
    }
  }
  ~SteppedFaults() override {
    queue_->close();
    MVGPU_CHECK(guest_.container().detach(&faulting_).has_value());
  }

  double mean_ns(domain::FaultStep step) const {
    const domain::FaultTimes::Figures figures = times_.of(step);
    return static_cast<double>(figures.total_ns) / static_cast<double>(figures.count);
  }

 private:
  void Fault(Iova page) {
    domain::FaultGroup group;
    group.requests = {{domain::kFaultRead | domain::kFaultWrite, page.value()}};
    MVGPU_CHECK(queue_->submit(std::move(group), this).has_value() && router_.handle_one());
    MVGPU_CHECK(faulting_.invalidate(RangeOf({page.page(), 1})) == 1);
  }
  void on_answer(const domain::FaultGroup&, domain::FaultAnswer answer) override {
    MVGPU_CHECK(answer == domain::FaultAnswer::kSuccess);
  }

  Guest guest_;
  domain::AssignedSpace space_;
  domain::SpaceTarget target_;
  domain::FaultTimes times_;
  domain::FaultingDomain faulting_;
  const std::unique_ptr<domain::FaultQueue> queue_;
  domain::FaultRouter router_;
};

void MeasureSteps(Table* table) {
  using domain::FaultStep;
  std::unique_ptr<SteppedFaults> stepped;
  for (const FaultStep step : {FaultStep::kReport, FaultStep::kQueue, FaultStep::kPin,
                               FaultStep::kMap, FaultStep::kResume}) {
    table->measure(fmt::format("step of a fault: {}, 1 page, io-uring", FaultStepName(step)), "ns",
                   "mean, by the clock on the wall", {}, [&]() -> Result<double> {
                     if (stepped == nullptr) {
                       MVGPU_ASSIGN_OR_RETURN(auto backend, domain::MakeIoUringPinBackend());
                       stepped =
                           std::make_unique<SteppedFaults>(table->settings(), std::move(backend));
                     }
                     return stepped->mean_ns(step);
                   });
  }
}

}  // namespace

void MeasureFaults(Table* table) {
  const Settings& settings = table->settings();
  for (const uint64_t around : {1, 16}) {
    table->compare(fmt::format("fault to mapping and given back, pages: {}, io-uring", around),
                   "the two calls that register a buffer and drop it", Target::AtMost(1.5),
                   [&] { return AgainstThePin(settings, around); });
  }
  MeasureSteps(table);
}

}  // namespace mvgpu::bench
