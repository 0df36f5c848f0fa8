#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <memory>
#include <utility>
#include <vector>

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/assigned/assigned_domain.h"
#include "apionly-domain/container.h"
#include "apionly-domain/pin/device_pins.h"
#include "apionly-domain/pin/mlock_pin_backend.h"
#include "tests/bench/accounts_table.h"
#include "tests/bench/bench_guest.h"
#include "tests/bench/temp_ledger.h"

namespace mvgpu::bench {

namespace {

using domain::Access;

// The IOMMU of an assigned device as far as the hand-over goes: it holds what it maps, and costs
// nothing. What a real one costs is not ours.
class FreeIommu final : public domain::AssignedIommu {
 public:
  std::string_view name() const override { return "free"; }
  Result<void> map(IovaRange, std::byte*, Access) override { return {}; }
  Result<void> unmap(IovaRange) override { return {}; }
  void flush() override {}
  bool holds_memory() const override { return true; }
  std::span<const IovaRange> usable_ranges() const override { return {&all_, 1}; }
  uint64_t page_sizes() const override { return kPageSize; }

 private:
  const IovaRange all_ = IovaRange::FromFirstAndLast(Iova(0), Iova((uint64_t{1} << 47) - 1));
};

// A VM whose vGPU pins a tenth of memory, in runs of 2 MiB, and a device that is not assigned yet.
// mlock keeps so many runs apart as the areas of a process allow, which are too few for smaller
// ones.
class PinnedVm final : public domain::PinOwner {
 public:
  static constexpr uint64_t kRunPages = 512;
  static constexpr uint64_t kDistance = 10 * kRunPages;

  explicit PinnedVm(uint64_t memory)
      : ledger_(accounts_.open()),
        space_(std::make_unique<FreeIommu>(), {.prefer_below = Iova(0)}) {
    MVGPU_CHECK(
        container_.map({Iova(0), memory, Access::kReadWrite, MakeFile(memory), 0}).has_value());
    auto vgpu = domain::ApiOnlyDomain::Create(
        {.device_pins = &device_pins_}, domain::MakeMlockPinBackend(), ledger_.get(), nullptr);
    auto device =
        domain::AssignedDomain::Create({.device_pins = &device_pins_}, &space_, ledger_.get());
    MVGPU_CHECK(vgpu && device);
    vgpu_ = std::move(*vgpu);
    device_ = std::move(*device);
    MVGPU_CHECK(container_.attach(vgpu_.get()).has_value());
    context_ = vgpu_->open_context(this);
  }
  ~PinnedVm() override {
    pins_.clear();
    context_.reset();
    MVGPU_CHECK(container_.unmap_all() && container_.detach(vgpu_.get()));
  }
  PinnedVm(const PinnedVm&) = delete;
  PinnedVm& operator=(const PinnedVm&) = delete;

  Result<void> pin_a_tenth() {
    const uint64_t pages = container_.totals().mapped_pages;
    for (uint64_t page = 0; page + kRunPages <= pages; page += kDistance) {
      MVGPU_ASSIGN_OR_RETURN(domain::PinnedRange pin,
                             context_->pin(RangeOf({page, kRunPages}), Access::kReadWrite));
      host_.push_back(pin.runs().front().host);
      pins_.push_back(std::move(pin));
    }
    // One area each: then every run takes one call to lock and one to unlock.
    MVGPU_CHECK(vgpu_->counters().locked_pages == pins_.size() * kRunPages);
    return {};
  }
  void attach_and_detach() {
    MVGPU_CHECK(container_.attach(device_.get()).has_value());
    MVGPU_CHECK(vgpu_->counters().locked_pages == 0);
    MVGPU_CHECK(container_.detach(device_.get()).has_value());
    MVGPU_CHECK(vgpu_->counters().locked_pages == pins_.size() * kRunPages);
  }
  // The same locks of the same memory.
  void unlock_and_lock() const {
    const auto size = BytesIn(kRunPages);
    for (std::byte* host : host_) MVGPU_CHECK(syscall(SYS_munlock, host, size) == 0);
    for (std::byte* host : host_) MVGPU_CHECK(syscall(SYS_mlock, host, size) == 0);
  }
  uint64_t runs() const { return host_.size(); }

  std::string_view pin_owner_name() const override { return "bench"; }
  void on_revoke(IovaRange) override {}

 private:
  TempLedger accounts_;
  std::unique_ptr<domain::Ledger> ledger_;
  domain::DevicePins device_pins_;
  domain::Container container_;
  domain::AssignedSpace space_;
  std::unique_ptr<domain::ApiOnlyDomain> vgpu_;
  std::unique_ptr<domain::AssignedDomain> device_;
  std::unique_ptr<domain::PinContext> context_;
  std::vector<domain::PinnedRange> pins_;
  std::vector<std::byte*> host_;  // where each begins
};

Result<Comparison> HandOver(uint64_t memory) {
  const auto vm = std::make_shared<PinnedVm>(memory);
  MVGPU_RETURN_IF_ERROR(vm->pin_a_tenth());
  return Comparison{Timed(vm->runs(), [vm](uint64_t) { vm->attach_and_detach(); }),
                    Timed(vm->runs(), [vm](uint64_t) { vm->unlock_and_lock(); })};
}

}  // namespace

// What is pinned is real memory: 6.4 GiB of 64.
void MeasureHandOver(Table* table) {
  table->compare("hand-over of an assigned domain, a tenth of it pinned",
                 "munlock + mlock of each run", Target::AtMost(2),
                 [&] { return HandOver(table->settings().memory); });
}

}  // namespace mvgpu::bench
