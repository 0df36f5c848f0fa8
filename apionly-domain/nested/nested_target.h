#pragma once

#include "apionly-domain/access.h"
#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/nested/table_walker.h"

namespace mvgpu::domain {

// Where a NestedDomain puts the mappings that it finds: a software IOMMU, another container, the
// translation table of a device model. Calls come one at a time, with the NestedDomain's lock held:
// an implementation must not call back.
class NestedTarget {
 public:
  virtual ~NestedTarget() = default;
  // From now on the device reaches guest memory from `start` on at these IOVAs. Whole pages, of
  // which none is mapped; the guest memory is pinned, and stays so until it is unmapped here.
  // On an error none of them is mapped.
  virtual Result<void> map(IovaRange iova, GuestPhys start, Access access) = 0;
  // When this returns, the device does not reach anything at these IOVAs any more. Whole pages, all
  // of them mapped, in one or several calls of map() and not necessarily all of those.
  virtual void unmap(IovaRange iova) = 0;
};

}  // namespace mvgpu::domain
