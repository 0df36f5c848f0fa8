#include <fmt/format.h>

#include <memory>

#include <absl/container/flat_hash_set.h>

#include "apionly-domain/assigned/device_target.h"
#include "apionly-domain/base/check.h"
#include "apionly-domain/faults/faulting_domain.h"
#include "backend/policies/pinning_policy.h"

namespace mvgpu::backend {

namespace {

using domain::Access;
using domain::FaultingDomain;

constexpr uint64_t kAroundPages = 16;

// The device's addresses, with the accessed flags that VT-d's second stage and SMMUv3 have.
class FlaggedTarget final : public domain::DeviceTarget {
 public:
  explicit FlaggedTarget(domain::AssignedSpace* space) : inner_(space) {}
  void set_accessed(Iova page) { accessed_.insert(page.page()); }

  Result<void> map(IovaRange iova, std::byte* host, Access access) override {
    return inner_.map(iova, host, access);
  }
  void unmap(IovaRange iova) override { inner_.unmap(iova); }
  void flush() override { inner_.flush(); }
  bool shows(IovaRange iova, const std::byte* host) const override {
    return inner_.shows(iova, host);
  }
  bool take_accessed(Iova page) override { return accessed_.erase(page.page()) != 0; }

 private:
  domain::SpaceTarget inner_;
  absl::flat_hash_set<uint64_t> accessed_;  // pages
};

// I/O page faults: the guest maps without telling anybody; the device finds out.
class IopfPolicy final : public PinningPolicy {
 public:
  explicit IopfPolicy(PolicyGuest* guest)
      : guest_(*guest),
        target_(&guest->space()),
        faulting_({.around_pages = kAroundPages}, {&guest->domain(), &target_, nullptr}) {}
  ~IopfPolicy() override {
    if (is_attached_) MVGPU_CHECK(guest_.container().detach(&faulting_).has_value());
  }

  Result<void> begin() override {
    MVGPU_RETURN_IF_ERROR(guest_.container().attach(&faulting_));
    is_attached_ = true;
    return {};
  }
  Result<void> map(uint32_t, const DmaBuffer&) override { return {}; }
  Result<void> unmap(uint32_t, const DmaBuffer&) override { return {}; }
  Result<void> access(std::span<const PageRun> pages, Access access) override {
    for (const PageRun& run : pages) {
      for (uint64_t page = run.first; page < run.end(); ++page) {
        MVGPU_RETURN_IF_ERROR(Touch(Iova(BytesIn(page)), access));
      }
    }
    return {};
  }
  void tick() override { faulting_.drop_unused(); }
  std::byte* reach(Iova page, Access access) override {
    return guest_.iommu().translate(page, access);
  }
  uint64_t notifications() const override { return faulting_.counters().faults; }

 private:
  Result<void> Touch(Iova page, Access access) {
    if (guest_.iommu().translate(page, access) == nullptr) {
      MVGPU_ASSIGN_OR_RETURN(const FaultingDomain::Resolved resolved,
                             faulting_.fault(page, access));
      if (resolved.outcome == FaultingDomain::Outcome::kRetry) {
        return Fail(ErrorCode::kBusy,
                    fmt::format("a fault at {:#x} was to be tried again", page.value()));
      }
    }
    target_.set_accessed(page);
    return {};
  }

  PolicyGuest& guest_;  // outlives this: contract of MakePolicy()
  FlaggedTarget target_;
  FaultingDomain faulting_;
  bool is_attached_ = false;
};

}  // namespace

std::unique_ptr<PinningPolicy> MakeIopfPolicy(PolicyGuest* guest) {
  return std::make_unique<IopfPolicy>(guest);
}

}  // namespace mvgpu::backend
