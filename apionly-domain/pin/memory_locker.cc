#include "apionly-domain/pin/memory_locker.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>

namespace mvgpu::domain {

namespace {

int ErrnoOfCall(long result) { return result == 0 ? 0 : errno; }

// The bare system calls: the sanitizers' run-time replaces mlock() by nothing, and the kernel's
// count is what our tests believe.
class KernelMemoryLocker final : public MemoryLocker {
 public:
  int lock(const std::byte* address, uint64_t size) override {
    return ErrnoOfCall(syscall(SYS_mlock, address, size));
  }
  int lock_on_fault(const std::byte* address, uint64_t size) override {
    return ErrnoOfCall(syscall(SYS_mlock2, address, size, MLOCK_ONFAULT));
  }
  int bring_in(std::byte* address, uint64_t size) override {
    return ErrnoOfCall(syscall(SYS_madvise, address, size, MADV_POPULATE_READ));
  }
  int unlock(const std::byte* address, uint64_t size) override {
    return ErrnoOfCall(syscall(SYS_munlock, address, size));
  }
};

}  // namespace

std::unique_ptr<MemoryLocker> MakeKernelMemoryLocker() {
  return std::make_unique<KernelMemoryLocker>();
}

}  // namespace mvgpu::domain
