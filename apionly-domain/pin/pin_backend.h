#pragma once

#include <cstdint>
#include <memory>
#include <string_view>

#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/memory/guest_file.h"

namespace mvgpu::domain {

// How pages are kept from being moved out: one call for a run of pages that nobody held before, one
// when the last holder has gone. Not thread-safe: the domain calls it with its lock held.
class PinBackend {
 public:
  virtual ~PinBackend() = default;
  virtual std::string_view name() const = 0;

  // REQUIRES: no page of the run is pinned; the file stays mapped while any page of it is.
  // Errors: kLimit, with current, limit and remedy, when a limit of the kernel or of the back end
  // is reached (a retry after it was raised succeeds); kTruncated when the pages do not exist any
  // more; kPermission (file is read-only and the back end pins for writing); kSystem. Nothing is
  // pinned then.
  virtual Result<void> pin(const GuestFile& file, PageRun pages) = 0;
  // REQUIRES: pinned before, run by run or in any cut of those runs.
  virtual void unpin(const GuestFile& file, PageRun pages) = 0;

  // Pages that the kernel is asked to hold now: at least the pages that are pinned.
  virtual uint64_t locked_pages() const = 0;
  // Pages that a run of this file is rounded out to where it needs new locks now.
  virtual uint32_t granule_pages(const GuestFile& file) const = 0;
  // Separate locked stretches of memory now, and how many there may be; 0 where that costs nothing.
  virtual uint64_t areas() const { return 0; }
  virtual uint64_t area_budget() const { return 0; }
};

// For memory that cannot go away, such as hugetlbfs, or that need not stay: holds are only counted.
std::unique_ptr<PinBackend> MakeNonePinBackend();

// mlock(2): counted by the kernel as VmLck. See mlock_pin_backend.h.
std::unique_ptr<PinBackend> MakeMlockPinBackend();

// io_uring registered buffers, which are long-term pins: counted by the kernel as VmPin. See
// io_uring_pin_backend.h. Errors: kSystem when this process may not use io_uring.
Result<std::unique_ptr<PinBackend>> MakeIoUringPinBackend();

}  // namespace mvgpu::domain
