#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "dma-cache/vulkan/device_choice.h"
#include "dma-cache/vulkan/vulkan_api.h"
#include "dma-cache/vulkan/vulkan_loader.h"

namespace mvgpu::dma {

// Asks a device for everything that a choice depends on. Opens nothing.
VulkanDeviceFacts FactsOf(const VulkanLoader& loader, VkPhysicalDevice device);

// The first queue family that computes.
std::optional<uint32_t> ComputeFamilyOf(const VulkanLoader& loader, VkPhysicalDevice device);
// The memory types that device and host see alike without flushes, as a mask.
uint32_t CoherentTypesOf(const VulkanLoader& loader, VkPhysicalDevice device);

}  // namespace mvgpu::dma
