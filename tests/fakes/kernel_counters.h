#pragma once

#include <cstdint>
#include <fstream>
#include <string>

namespace mvgpu::testing {

// The judge: what the kernel counts as locked for this process (VmLck), in pages.
inline uint64_t KernelLockedPages() {
  std::ifstream status("/proc/self/status");
  for (std::string key; status >> key;) {
    uint64_t kilobytes = 0;
    if (key == "VmLck:" && status >> kilobytes) return kilobytes / 4;
  }
  return 0;
}

}  // namespace mvgpu::testing
