#pragma once

#include <compare>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>

#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/faults/vtd_page_records.h"
#include "apionly-domain/viommu/invalidation_descriptor.h"
#include "backend/policies/dma_trace.h"
#include "backend/policies/kernel_text.h"

namespace mvgpu::backend {

// The kernel's intel_iommu:* events (drivers/iommu/intel/trace.h) that tell what devices do with
// the address spaces of processes, by PASID.
//
//   prq_report  a device asks for a page and touches it; at its first request it is mapped
//   qi_submit   an invalidation of the device's TLB: it gives up the pages of that range. Other
//               descriptors say nothing of a device's pages and are passed over
//
// A page belongs to (IOMMU unit, requester, PASID, address), and where in the guest's memory it is,
// nobody says. So each 2 MiB of such a space, once a page of it is asked for, is 2 MiB of memory
// apart from all other, and neighbours stay neighbours.
//
// Left out: requests for nothing (stop markers), descriptors that are none.
class PageRequestEvents {
 public:
  // `builder` outlives this.
  explicit PageRequestEvents(DmaTraceBuilder* builder) : builder_(*builder) {}

  static bool Knows(const KernelEvent& event);
  // Errors: kCorrupt, without the line; those of DmaTraceBuilder. REQUIRES: Knows(event).
  Result<void> take(const KernelEvent& event, uint64_t now_ns);

 private:
  struct Space {
    std::string unit;  // as the kernel names it: dmar0
    uint16_t requester = 0;
    uint32_t pasid = 0;  // 0: requests without one
    auto operator<=>(const Space&) const = default;
  };
  struct Live {
    uint32_t buffer = 0;  // of this one page
    bool is_writable = false;
    bool is_readable = false;
  };
  struct Pages {
    std::map<uint64_t, Live> live;       // by page number in the space
    std::map<uint64_t, uint64_t> apart;  // block of the space -> its first page of memory
  };

  Result<void> TakeRequest(const KernelEvent& event);
  Result<void> TakeDescriptor(const KernelEvent& event);
  Result<void> Skip(const KernelEvent& event);
  Result<void> Touch(const domain::VtdPageRequest& request, Pages* pages);
  Result<void> GiveUp(const domain::DeviceTlbInvalidation& what, const std::string& unit);
  // Where in memory a page of the space is.
  Result<uint64_t> PlaceOf(uint64_t page, Pages* pages);

  DmaTraceBuilder& builder_;
  uint64_t now_ns_ = 0;
  std::map<Space, Pages> spaces_;
};

// What a prq_report says, either decoded, as the kernel prints it, or as the words of the queue
// (dw0 to dw3), as trace-cmd and perf do, who cannot call the kernel's decoder. The kernel prints
// bits 63:12 of the second word as `addr`, the number of a page; what cannot be one, since the
// address would not be canonical, but is the address of a page, is taken as that. Decoded, PASID 0
// and none are the same. Error: kCorrupt.
Result<domain::VtdPageRequest> PageRequestOf(const KernelEvent& event);

}  // namespace mvgpu::backend
