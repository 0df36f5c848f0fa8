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

  // Errors: kLimit, with current, limit and remedy, when the kernel's limit is reached; kTruncated
  // when the pages do not exist any more; kSystem. Nothing is pinned then.
  virtual Result<void> pin(const GuestFile& file, PageRun pages) = 0;
  // REQUIRES: pinned before, run by run or in any cut of those runs.
  virtual void unpin(const GuestFile& file, PageRun pages) = 0;

  // Pages that the kernel is asked to hold now: whole granules, so at least the pages that are
  // pinned.
  virtual uint64_t locked_pages() const = 0;
  // Pages per granule for a file: runs are rounded out to it.
  virtual uint32_t granule_pages(const GuestFile& file) const = 0;
};

// For memory that cannot go away, such as hugetlbfs, or that need not stay: holds are only counted.
std::unique_ptr<PinBackend> MakeNonePinBackend();

// mlock(2) in granules. A file is cut into at most 16384 of them, so that scattered pins cannot use
// up the process's memory areas (vm.max_map_count, 65530 by default: each lone granule costs two).
std::unique_ptr<PinBackend> MakeMlockPinBackend();

}  // namespace mvgpu::domain
