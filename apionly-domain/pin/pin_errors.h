#pragma once

#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/memory/guest_file.h"

namespace mvgpu::domain {

// Why the kernel would not lock or pin pages of a file, found out afterwards. Slow, for the error
// path only.

// `new_pages` of memory more were to be locked.
Error MlockError(int sys_errno, const GuestFile& file, PageRun pages, uint64_t new_pages);
Error IoUringPinError(int sys_errno, const GuestFile& file, PageRun pages);
Error IoUringSetupError(int sys_errno);
// VFIO type1 would not map `iova` for a device, which pins and locks the memory behind it.
Error Type1MapError(int sys_errno, IovaRange iova);
// The same of iommufd, which pins it.
Error IommufdMapError(int sys_errno, IovaRange iova);

}  // namespace mvgpu::domain
