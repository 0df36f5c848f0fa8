// Built instead of open_vulkan_mapper.cc and all the rest where Vulkan's headers are missing.

#include "dma-cache/vulkan/open_vulkan_mapper.h"

namespace mvgpu::dma {

Result<std::unique_ptr<Mapper>> OpenVulkanMapper(const VulkanMapperOptions&) {
  return Fail(ErrorCode::kSystem,
              "this build is without vulkan: install libvulkan-dev and build again, or choose "
              "another mapper");
}

}  // namespace mvgpu::dma
