#pragma once

#include <cstddef>
#include <cstdint>

#include <absl/container/flat_hash_map.h>

#include "apionly-domain/assigned/assigned_space.h"
#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/pin/pinned_range.h"

namespace mvgpu::backend {

// Guest pages that a device sees at their own addresses, each as long as somebody wants it to: an
// IOMMU has one entry for a page, however many buffers lie in it. Not thread-safe.
class ShownPages {
 public:
  // `space` outlives this.
  explicit ShownPages(domain::AssignedSpace* space) : space_(*space) {}

  // Once more for each page of the run. Errors: those of AssignedSpace::map_at(); nothing changes
  // then.
  Result<void> add(const domain::PinnedRun& run);
  // Once less. REQUIRES: added before. The pages that are gone are out of the device's reach when
  // this returns.
  void remove(PageRun pages);

 private:
  domain::AssignedSpace& space_;
  absl::flat_hash_map<uint64_t, uint32_t> users_;  // by page; never 0
};

}  // namespace mvgpu::backend
