#include "dma-cache/vulkan/vulkan_api.h"

#include <fmt/format.h>

namespace mvgpu::dma {

Error VulkanError(VkResult result, const std::string& what) {
  const auto with = [&](ErrorCode code, std::string_view why) {
    return Error(code, fmt::format("{}: {} (VkResult {})", what, why, static_cast<int>(result)));
  };
  switch (result) {
    case VK_ERROR_OUT_OF_HOST_MEMORY:
      return with(ErrorCode::kLimit,
                  "the driver is out of host memory; raise the memory or memlock limit");
    case VK_ERROR_OUT_OF_DEVICE_MEMORY:
      return with(ErrorCode::kLimit, "the device is out of memory; let it work on less at a time");
    case VK_ERROR_TOO_MANY_OBJECTS:
      return with(ErrorCode::kLimit, "the driver has no room for another allocation");
    case VK_ERROR_INVALID_EXTERNAL_HANDLE:
      return with(ErrorCode::kNotReachable,
                  "the driver does not import this memory, which must be there and writable; "
                  "amdgpu imports none that has a file, as guest memory does: choose another "
                  "device or mapper");
    case VK_ERROR_LAYER_NOT_PRESENT:
      return with(ErrorCode::kSystem, "a layer is not installed");
    case VK_ERROR_EXTENSION_NOT_PRESENT:
      return with(ErrorCode::kSystem, "an extension is missing");
    case VK_ERROR_INCOMPATIBLE_DRIVER:
      return with(ErrorCode::kSystem, "no driver is installed, e.g. mesa-vulkan-drivers");
    case VK_ERROR_INITIALIZATION_FAILED:
      return with(ErrorCode::kSystem, "the driver could not start");
    case VK_ERROR_DEVICE_LOST:
      return with(ErrorCode::kSystem, "the device was lost; start the process again");
    default:
      return with(ErrorCode::kSystem, "the driver refused");
  }
}

}  // namespace mvgpu::dma
