#include "tests/bench/own_memory.h"

#include <malloc.h>

#include <cstdint>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "tests/bench/harness.h"

namespace mvgpu::bench {

OwnMemory OwnMemory::Now() {
  const struct mallinfo2 info = mallinfo2();
  OwnMemory now{static_cast<double>(info.uordblks + info.hblkhd), 0};
  std::ifstream rollup("/proc/self/smaps_rollup");
  for (std::string line; std::getline(rollup, line);) {
    if (line.starts_with("Anonymous:")) now.touched = std::stod(line.substr(10)) * 1024;
  }
  return now;
}

void SettleHeap() {
  malloc_trim(0);
  std::vector<std::unique_ptr<char[]>> blocks;
  for (size_t i = 0; i < 256; ++i) blocks.push_back(std::make_unique<char[]>(4096));
  Keep(reinterpret_cast<uint64_t>(blocks.data()));
}

}  // namespace mvgpu::bench
