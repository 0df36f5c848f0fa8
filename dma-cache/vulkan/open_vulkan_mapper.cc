#include "dma-cache/vulkan/open_vulkan_mapper.h"

#include <utility>

#include "dma-cache/vulkan/device_choice.h"
#include "dma-cache/vulkan/vulkan_device.h"
#include "dma-cache/vulkan/vulkan_loader.h"
#include "dma-cache/vulkan/vulkan_mapper.h"

namespace mvgpu::dma {

Result<std::unique_ptr<Mapper>> OpenVulkanMapper(const VulkanMapperOptions& options) {
  MVGPU_ASSIGN_OR_RETURN(const DeviceChoice choice, DeviceChoice::Parse(options.device));
  VulkanLoader::Options loading;
  loading.library = options.library;
  MVGPU_ASSIGN_OR_RETURN(auto loader, VulkanLoader::Open(loading));
  MVGPU_ASSIGN_OR_RETURN(auto device, VulkanDevice::Create(std::move(loader), choice));
  VulkanMapper::Options mapping;
  mapping.mapping_at = options.mapping_at;
  return std::make_unique<VulkanMapper>(std::move(device), std::move(mapping));
}

}  // namespace mvgpu::dma
