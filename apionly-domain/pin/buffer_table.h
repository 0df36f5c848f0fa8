#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "apionly-domain/base/error.h"

namespace mvgpu::domain {

// A table of memory that the kernel keeps pinned.
class BufferTable {
 public:
  virtual ~BufferTable() = default;
  virtual uint32_t slots() const = 0;
  // Both answer 0 or an errno; after an error nothing has changed. REQUIRES: the slot is empty.
  virtual int fill(uint32_t slot, std::byte* address, uint64_t size) = 0;
  // REQUIRES: the slot is filled.
  virtual int empty(uint32_t slot) = 0;
};

// The registered buffers of an io_uring of its own, which never runs a request: 16384 slots, as
// many as a ring can have. Errors: kSystem, with the remedy.
Result<std::unique_ptr<BufferTable>> MakeIoUringBufferTable();

}  // namespace mvgpu::domain
