#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <vector>

#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "backend/policies/dma_trace.h"
#include "backend/policies/kernel_text.h"

namespace mvgpu::backend {

// The kernel's iommu:* events (include/trace/events/iommu.h), with the end of a range, as newer
// kernels print it, and without: what is put into I/O page tables, whoever asked. Recorded in a
// guest, paddr is guest-physical.
//
//   map    the pages at paddr are mapped; the device may touch them, and is taken to do so once
//   unmap  it gives them up; of a mapping of which a part goes, the rest is mapped anew first
//
// The events carry neither device nor domain. Domains are guessed: mappings that are at one IOVA at
// the same time are in different ones. An unmap is for the first domain that has mappings which
// begin and end as it does, else for the first that has anything there. Which of two devices lost a
// page can thus be wrong, how many pages are mapped cannot.
//
// Left out: attach_device_to_domain and the like (they tell of no page), io_page_fault (an access
// that did not happen), unmaps of what was mapped before the trace began, and maps of what is no
// RAM on a PC: from 3 to 4 GiB (doorbells, registers) and from 1 TiB on.
class IommuMapEvents {
 public:
  // Of domains at once; in the last one a map ends what is there before.
  static constexpr size_t kMaxDomains = 64;

  // `builder` outlives this.
  explicit IommuMapEvents(DmaTraceBuilder* builder) : builder_(*builder) {}

  static bool Knows(const KernelEvent& event);
  // Errors: kCorrupt, without the line; those of DmaTraceBuilder. REQUIRES: Knows(event).
  Result<void> take(const KernelEvent& event, uint64_t now_ns);

  // Where a device that uses the IOVA `iova` reaches guest memory `phys` now, all of it in one
  // mapping: the buffer, and its page at which that begins.
  struct Found {
    uint32_t buffer = 0;
    uint64_t first = 0;
  };
  std::optional<Found> find(uint64_t iova, const IovaRange& phys) const;

 private:
  struct Mapping {
    IovaRange iova;
    uint64_t phys = 0;
    uint32_t buffer = 0;
  };
  using Domain = std::map<uint64_t, Mapping>;  // by the first IOVA; they do not overlap

  static Domain::const_iterator FirstIn(const Domain& domain, const IovaRange& iova);
  static bool HasAny(const Domain& domain, const IovaRange& iova);
  static bool HasExactly(const Domain& domain, const IovaRange& iova);

  Result<void> TakeMap(const KernelEvent& event);
  Result<void> TakeUnmap(const KernelEvent& event);
  Result<void> Skip(const KernelEvent& event);
  Result<void> Map(const IovaRange& iova, uint64_t phys, Domain* domain, bool is_touched);
  // Takes `iova` out of the domain.
  Result<void> Cut(const IovaRange& iova, Domain* domain);

  DmaTraceBuilder& builder_;
  uint64_t now_ns_ = 0;
  std::vector<Domain> domains_;
};

}  // namespace mvgpu::backend
