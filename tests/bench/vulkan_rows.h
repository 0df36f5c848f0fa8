#pragma once

#include "tests/bench/harness.h"

namespace mvgpu::bench {

// What the Vulkan mapper costs on the first device that can map guest memory. Rows of the cache's
// table; only in builds with Vulkan's headers.
void MeasureVulkan(Table* table);

}  // namespace mvgpu::bench
