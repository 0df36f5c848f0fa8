#pragma once

#include "apionly-domain/base/error.h"
#include "backend/policies/dma_trace.h"
#include "backend/trace/trace_reader.h"

namespace mvgpu::backend {

// The DMA of a recorded session (trace/trace_format.h), from what its requests say and their
// responses confirm: a resource's page list is a buffer, mapped from ATTACH_BACKING to
// DETACH_BACKING, RESOURCE_UNREF or a reset; TRANSFER_TO_HOST_2D is the device's access, to all
// pages from its first byte to its last. The guest's memory is all that the VMM mapped at any time
// with a file behind. Skipped: buffers and accesses outside of that. Requests are read by CPU
// copies, and are no DMA.
//
// Errors: kCorrupt, those of DmaTraceBuilder. REQUIRES: the reader is at its beginning.
Result<DmaTrace> ImportSession(TraceReader* reader);

}  // namespace mvgpu::backend
