#pragma once

#include <cstdint>
#include <vector>

#include "apionly-domain/viommu/dma_space.h"
#include "apionly-domain/viommu/iommu_object.h"
#include "apionly-domain/viommu/vtd_iommu.h"

namespace mvgpu::domain {

// A device's requests behind a VtdIommu: under a PASID, or without one. In bypass, addresses
// without PASID are guest memory's, and those with one lead nowhere.
//
// Requests are untranslated ones, so that what the tables do not allow is in the guest's fault log.
// A device that may ask for pages (ATS and PRI are on) asks for translations first. Where these
// fail in a way that the guest can put right, it asks for the pages, one group at a time, and the
// request is pending until the answer. What was not granted is then a fault as any other.
//
// The results are kept as long as the unit might: until an invalidation of the IOTLB, of the PASID
// cache or of the device's TLB names them, the binding changes, or the unit forgets everything. The
// user has let go before the unit answers an invalidation wait.
//
// Not thread-safe: called by whoever may call the unit.
class VtdDmaSpace final : public DmaSpace, private IommuListener, private FaultSource {
 public:
  class Owner {
   public:
    virtual ~Owner() = default;
    // What was pending may be tried again. Called from within the unit.
    virtual void on_pages_answered() = 0;
  };
  // Unit, object and owner outlive this; the object is the unit's, which has space.source among its
  // devices. Without an owner, the device never asks for pages.
  VtdDmaSpace(VtdIommu* iommu, IommuObject* object, DeviceSpace space, Owner* owner);
  ~VtdDmaSpace() override;
  VtdDmaSpace(const VtdDmaSpace&) = delete;
  VtdDmaSpace& operator=(const VtdDmaSpace&) = delete;

  void set_user(User* user) override { user_ = user; }
  // kLimit: the object has no room for the binding of this PASID.
  Result<std::vector<DmaRun>> translate(IovaRange range, Access access) override;

  // The device is reset: it waits for nothing any more.
  void cancel();

  const DeviceSpace& space() const { return space_; }

 private:
  static constexpr size_t kMostRequests = 32;  // of a group

  void on_iommu_event(const IommuEvent& event) override;
  void on_answer(const FaultGroup& group, FaultAnswer answer) override;
  VtdResult Ask(Iova at, Access access, VtdRequest::Kind kind);
  // What a request at an address that has no translation ends in.
  Error Refuse(Iova at, Access access, VtdFault fault);
  // Whether the guest may still put this right.
  bool MayAsk(const VtdFault& fault) const;
  Error AskFor(std::vector<PageRequest> pages, Access access, VtdFault first);
  // Whether invalidations of this space will be heard.
  bool IsFollowed();

  VtdIommu& iommu_;      // outlives this: contract of the constructor
  IommuObject& object_;  // likewise
  const DeviceSpace space_;
  Owner* const owner_;                 // likewise; null: no pages are asked for
  uint64_t largest_page_ = kPageSize;  // of what the user may keep
  bool is_waiting_ = false;            // a group is on its way
  bool is_denied_ = false;             // the last one was, and nothing was asked since
  uint32_t next_group_ = 0;
  User* user_ = nullptr;  // outlives this, or has left
};

}  // namespace mvgpu::domain
