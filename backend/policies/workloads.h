#pragma once

#include <cstdint>

#include "apionly-domain/base/error.h"
#include "backend/policies/dma_trace.h"

namespace mvgpu::backend {

// A server as coIOMMU's authors measured it (USENIX ATC 2020, 5.1-5.3, as a survey quotes them): 32
// GiB of guest memory, of which at most 174 MB are pinned, 0.5 %, since the buffers of network and
// disk are used again and again. The traffic itself is not published; this one is made so that
// coIOMMU, with its scan a minute, comes to that peak:
//
//   network out  307 segments of 32 KiB a second, out of 64 MiB of socket buffers, in no order
//   network in   a ring of 256 buffers of 32 KiB that are always mapped, 100 a second are filled
//                and replaced from a pool of twice as many
//   disk         512 KiB every 0.7 s, on and on through the page cache, never the same again
//
// Steady from the second scan on, at 2 minutes.
struct PublishedWorkload {
  uint64_t memory = uint64_t{32} << 30;  // bytes; at least 2 GiB
  uint64_t seconds = 600;
  uint64_t seed = 1;
};
// The same for the same arguments. Errors: kInvalid, those of DmaTraceBuilder.
Result<DmaTrace> MakePublishedWorkload(const PublishedWorkload& workload);

}  // namespace mvgpu::backend
