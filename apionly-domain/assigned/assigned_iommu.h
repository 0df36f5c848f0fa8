#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "apionly-domain/access.h"
#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"

namespace mvgpu::domain {

// The IOMMU in front of a device that is assigned to this process: what its IOVAs mean. A real one
// (type1_container.h, iommufd_container.h), or one in software for machines without
// (software_iommu.h). It follows VFIO type1 v2: a mapping is one stretch of host memory, mappings
// never overlap, and one goes only as the whole that it came as.
//
// Thread-safe.
class AssignedIommu {
 public:
  virtual ~AssignedIommu() = default;
  virtual std::string_view name() const = 0;

  // From now on the device reaches `iova.size()` bytes of this process's memory from `host` on,
  // which the IOMMU holds there itself where it is a real one. Whole pages. Errors: kInvalid
  // (outside the usable ranges), kOverlap, kLimit (of the kernel, with its values), kTruncated,
  // kPermission, kSystem; nothing is mapped then.
  virtual Result<void> map(IovaRange iova, std::byte* host, Access access) = 0;
  // REQUIRES: `iova` is exactly what one map() was given. Errors: kWouldSplit or kNotMapped where
  // it is not, kSystem; it is mapped as before then.
  virtual Result<void> unmap(IovaRange iova) = 0;
  // From now on no device reaches what was unmapped before, not even through a translation that
  // it remembers.
  virtual void flush() = 0;

  // Whether the kernel holds what is mapped where it is, and counts each mapping of a page in this
  // process's memory: as locked or as pinned, which KernelCounterName(name()) says. Fixed.
  virtual bool holds_memory() const = 0;
  // Where IOVAs may be, in order. Fixed.
  virtual std::span<const IovaRange> usable_ranges() const = 0;
  // A set bit for each page size in bytes: bit 12 for 4 KiB, bit 21 for 2 MiB. Fixed.
  virtual uint64_t page_sizes() const = 0;
};

}  // namespace mvgpu::domain
