#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/assigned/assigned_space.h"
#include "apionly-domain/assigned/software_iommu.h"
#include "apionly-domain/base/unique_fd.h"
#include "apionly-domain/container.h"
#include "backend/policies/counting_pin_backend.h"
#include "backend/policies/dma_trace.h"

namespace mvgpu::backend {

// The machine that a policy runs on, made anew for each: a VM with the memory of the trace (sparse,
// so only what is really pinned is there), its container and api-only domain over a counted pin
// back end, and a device behind an IOMMU in software. Owner of pins for policies that give none up
// before their guest unmaps: nobody takes this memory away.
class PolicyGuest final : public domain::PinOwner {
 public:
  // Errors: kSystem, those of Container::map().
  static Result<std::unique_ptr<PolicyGuest>> Create(const DmaTrace& trace,
                                                     std::unique_ptr<domain::PinBackend> backend);
  // REQUIRES: nothing is pinned, nobody else is attached.
  ~PolicyGuest() override;

  domain::Container& container() { return container_; }
  domain::ApiOnlyDomain& domain() { return *domain_; }
  domain::AssignedSpace& space() { return *space_; }
  domain::SoftwareIommu& iommu() { return *iommu_; }  // the one of space()
  CountingPinBackend& backend() { return *backend_; }
  const PinFigures& pins() const { return figures_; }
  const DmaTrace& trace() const { return trace_; }

  // The part of the guest's memory around a page. REQUIRES: there is one.
  IovaRange memory_around(Iova iova) const;

  // More guest memory, above all that the trace has, with a view of it as the guest's kernel has:
  // for tables that guest and host share. It goes with this object.
  struct Extra {
    Iova start;
    std::byte* bytes;
  };
  Result<Extra> add_extra(uint64_t size);

  std::string_view pin_owner_name() const override { return "policy"; }
  void on_revoke(IovaRange) override {}

 private:
  explicit PolicyGuest(const DmaTrace& trace) : trace_(trace) {}
  Result<void> Begin(std::unique_ptr<domain::PinBackend> backend);

  const DmaTrace& trace_;  // outlives this, see RunPolicy()
  PinFigures figures_;
  domain::Container container_;
  CountingPinBackend* backend_ = nullptr;  // the domain's
  std::unique_ptr<domain::ApiOnlyDomain> domain_;
  domain::SoftwareIommu* iommu_ = nullptr;  // the space's
  std::unique_ptr<domain::AssignedSpace> space_;
  std::byte* extra_ = nullptr;
  uint64_t extra_size_ = 0;
};

}  // namespace mvgpu::backend
