#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace mvgpu::domain {

// The system calls of the mlock back end. All take whole pages and answer 0 or an errno.
class MemoryLocker {
 public:
  virtual ~MemoryLocker() = default;
  // Brings the pages in and keeps them. After an error some may be locked.
  virtual int lock(const std::byte* address, uint64_t size) = 0;
  // Keeps those that are in, and others once they come in.
  virtual int lock_on_fault(const std::byte* address, uint64_t size) = 0;
  virtual int bring_in(std::byte* address, uint64_t size) = 0;
  virtual int unlock(const std::byte* address, uint64_t size) = 0;
};

std::unique_ptr<MemoryLocker> MakeKernelMemoryLocker();

}  // namespace mvgpu::domain
