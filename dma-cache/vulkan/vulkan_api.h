#pragma once

// Vulkan's types. Its functions are looked up at run time (VulkanLoader), so that nothing links
// against the loader and the programs start where there is none.
#define VK_NO_PROTOTYPES 1
#include <vulkan/vulkan_core.h>

#include <string>

#include "apionly-domain/base/error.h"

namespace mvgpu::dma {

// What a Vulkan call that failed means here: kLimit where the driver ran out of something,
// kNotReachable for host memory that it cannot import, kSystem otherwise.
Error VulkanError(VkResult result, const std::string& what);

}  // namespace mvgpu::dma
