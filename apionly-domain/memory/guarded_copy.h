#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace mvgpu::domain {

// Copies from or to guest memory, or both; the ranges may overlap. False when a page of it is gone
// (the file behind it was truncated, SIGBUS): what was copied by then is undefined. Aligned words
// of 2, 4 and 8 bytes are copied in one access, so that ring indices are never seen half-written.
//
// This and the two below are the only code that dereferences guest memory. REQUIRES: both ranges
// stay mapped during the call; GuestFile::Create() has been called before.
bool CopyGuarded(void* to, const void* from, size_t size);

// Reads words out of guest memory, each in one access, so that none is seen half-written. False as
// above. REQUIRES: as above; `from` is aligned to 8.
bool LoadWordsGuarded(std::span<uint64_t> to, const void* from);

// Stores `desired` in a word of guest memory if that is *expected; *expected becomes what the word
// was. Ordered like an atomic read-modify-write of the guest's own. False as above, also when the
// page cannot be written. REQUIRES: as above; `word` is aligned to 8.
bool CompareExchangeGuarded(void* word, uint64_t* expected, uint64_t desired);

// Makes SIGBUS in a guarded copy an answer instead of a death. Once per process; GuestFile does it.
void InstallSigbusHandler();

}  // namespace mvgpu::domain
