#pragma once

#include <cstdint>
#include <functional>

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/viommu/device_address_space.h"
#include "apionly-domain/viommu/iommu_object.h"
#include "apionly-domain/viommu/vtd_dma_space.h"
#include "apionly-domain/viommu/vtd_iommu.h"

namespace mvgpu::backend {

// The IOMMU that a guest sees before its vGPU: a VT-d unit whose tables are in the VM's memory, and
// one address space of the vGPU behind it, that of the addresses in its commands. Registers are the
// methods of unit(); a VMM that has an IOMMU of its own has no use for this, so only tests and
// scripted sessions make one.
//
// Not thread-safe: it is the vGPU's, see Vgpu::use_iommu().
class GuestIommu final : private domain::VtdIommu::Owner, private domain::VtdDmaSpace::Owner {
 public:
  struct Options {
    domain::DeviceSpace space;  // which device the vGPU is, and under which PASID its commands are
    bool asks_for_pages = false;  // ATS and PRI are on: a command may wait for the guest's pages
    domain::VtdIommu::Options unit = {};
    domain::IommuObject::Limits limits = {};
  };
  // Interrupts of the unit, so far.
  struct Events {
    uint64_t faults = 0;
    uint64_t waits = 0;
    uint64_t page_requests = 0;
  };

  // The domain outlives this.
  GuestIommu(const Options& options, domain::ApiOnlyDomain* memory);

  domain::VtdIommu& unit() { return unit_; }
  domain::IommuObject& object() { return object_; }
  domain::VtdDmaSpace& space() { return space_; }
  // What the vGPU's addresses are; good while this lives.
  domain::DeviceAddressSpace addresses() { return {&space_, &object_}; }
  // Groups of pages that the vGPU waited for, so far.
  uint64_t pages_answered() const { return pages_answered_; }
  const Events& events() const { return events_; }

 private:
  void on_fault_event() override { ++events_.faults; }
  void on_wait_event() override { ++events_.waits; }
  void on_page_request_event() override { ++events_.page_requests; }
  void on_pages_answered() override { ++pages_answered_; }
  void on_interrupt_entries_invalid(const domain::InterruptEntryInvalidation&) override {}

  Events events_;
  uint64_t pages_answered_ = 0;
  domain::IommuObject object_;
  domain::VtdIommu unit_;
  domain::VtdDmaSpace space_;
};

}  // namespace mvgpu::backend
