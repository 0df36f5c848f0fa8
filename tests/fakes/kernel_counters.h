#pragma once

#include <cstdint>
#include <fstream>
#include <string>
#include <string_view>

namespace mvgpu::testing {

// A line of /proc/self/status in kB, in pages.
inline uint64_t KernelStatusPages(std::string_view wanted) {
  std::ifstream status("/proc/self/status");
  for (std::string key; status >> key;) {
    uint64_t kilobytes = 0;
    if (key == wanted && status >> kilobytes) return kilobytes / 4;
  }
  return 0;
}

// The judge: what the kernel counts as locked (mlock) and as pinned (io_uring) for this process.
inline uint64_t KernelLockedPages() { return KernelStatusPages("VmLck:"); }
inline uint64_t KernelPinnedPages() { return KernelStatusPages("VmPin:"); }

}  // namespace mvgpu::testing
