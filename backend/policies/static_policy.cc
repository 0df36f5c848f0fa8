#include <sys/sysinfo.h>

#include <fmt/format.h>

#include <memory>
#include <utility>
#include <vector>

#include "backend/policies/pinning_policy.h"

namespace mvgpu::backend {

namespace {

// All memory of the guest, as long as the device is assigned. The device needs no table of its own.
class StaticPolicy final : public PinningPolicy {
 public:
  explicit StaticPolicy(PolicyGuest* guest)
      : guest_(*guest), context_(guest->domain().open_context(guest)) {}

  Result<void> begin() override {
    MVGPU_RETURN_IF_ERROR(CheckHost());
    for (const IovaRange& range : guest_.trace().memory) {
      MVGPU_ASSIGN_OR_RETURN(domain::PinnedRange pinned,
                             context_->pin(range, domain::Access::kReadWrite));
      pinned_.push_back(std::move(pinned));
    }
    return {};
  }
  Result<void> map(uint32_t, const DmaBuffer&) override { return {}; }
  Result<void> unmap(uint32_t, const DmaBuffer&) override { return {}; }
  std::byte* reach(Iova page, domain::Access access) override {
    return domain::ApiOnlyDomain::Translator(guest_.domain()).translate(page, access);
  }
  uint64_t notifications() const override { return 0; }

 private:
  // Where pages are really held, a host without so much memory would kill something for it.
  Result<void> CheckHost() const {
    if (guest_.backend().name() == "none") return {};
    struct sysinfo host {};
    if (sysinfo(&host) != 0) return FailSystem(errno, "sysinfo");
    const uint64_t wanted = BytesIn(guest_.trace().memory_pages());
    const uint64_t free = uint64_t{host.freeram} * host.mem_unit;
    if (wanted <= free) return {};
    return Fail(ErrorCode::kLimit,
                fmt::format("pins {} MiB, this host has {} MiB free: compare with --pin=none",
                            wanted >> 20, free >> 20));
  }

  PolicyGuest& guest_;  // outlives this: contract of MakePolicy()
  const std::unique_ptr<domain::PinContext> context_;
  std::vector<domain::PinnedRange> pinned_;  // of the context: goes first
};

}  // namespace

std::unique_ptr<PinningPolicy> MakeStaticPolicy(PolicyGuest* guest) {
  return std::make_unique<StaticPolicy>(guest);
}

}  // namespace mvgpu::backend
