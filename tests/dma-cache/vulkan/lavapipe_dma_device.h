#pragma once

#include <memory>

#include "apionly-domain/base/error.h"
#include "tests/dma-cache/dma_device.h"

namespace mvgpu::testing {

// Mesa's Vulkan device on the CPU behind a Vulkan mapper: a compute shader reads at the addresses.
Result<std::unique_ptr<DmaDevice>> MakeLavapipe(const DeviceSurroundings& vm);

// Whether this machine has none, whatever the loader says.
bool IsLavapipeMissing();

}  // namespace mvgpu::testing
