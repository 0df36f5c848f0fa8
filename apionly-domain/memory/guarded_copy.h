#pragma once

#include <cstddef>

namespace mvgpu::domain {

// Copies from or to guest memory, or both; the ranges may overlap. False when a page of it is gone
// (the file behind it was truncated, SIGBUS): what was copied by then is undefined. Aligned words
// of 2, 4 and 8 bytes are copied in one access, so that ring indices are never seen half-written.
//
// The only code that dereferences guest memory. REQUIRES: both ranges stay mapped during the call;
// GuestFile::Create() has been called before.
bool CopyGuarded(void* to, const void* from, size_t size);

// Makes SIGBUS in a guarded copy an answer instead of a death. Once per process; GuestFile does it.
void InstallSigbusHandler();

}  // namespace mvgpu::domain
