#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "apionly-domain/base/error.h"
#include "dma-cache/vulkan/device_choice.h"
#include "dma-cache/vulkan/imported_buffer.h"
#include "dma-cache/vulkan/vulkan_api.h"
#include "dma-cache/vulkan/vulkan_loader.h"

namespace mvgpu::dma {

// A Vulkan device that can work on guest memory: opened with VK_EXT_external_memory_host and
// bufferDeviceAddress, and with one queue for compute. The mapper only imports and takes addresses;
// a renderer may share the device through handle(), queue() and get(), and must be gone before it.
//
// Thread-safe after creation: nothing in it changes. Vulkan wants queue() used by one thread at a
// time; imports need no such care.
class VulkanDevice {
 public:
  // Opens the device that is meant. Errors: those of DeviceChoice::pick(); kSystem, kLimit.
  static Result<std::unique_ptr<VulkanDevice>> Create(std::unique_ptr<VulkanLoader> loader,
                                                      const DeviceChoice& choice);
  // REQUIRES: everything made of the device has gone.
  ~VulkanDevice();
  VulkanDevice(const VulkanDevice&) = delete;
  VulkanDevice& operator=(const VulkanDevice&) = delete;

  const VulkanDeviceFacts& facts() const { return facts_; }
  const VulkanLoader& loader() const { return *loader_; }
  VkPhysicalDevice physical() const { return physical_; }
  VkDevice handle() const { return target_.device; }
  uint32_t queue_family() const { return queue_family_; }
  VkQueue queue() const { return queue_; }
  // Where guest memory is imported; lives as long as the device.
  const ImportTarget& target() const { return target_; }

  // A function of the device, by its name and type; null when it is not there.
  template <typename Function>
  Function get(const char* name) const {
    return reinterpret_cast<Function>(get_device_proc_(target_.device, name));
  }

 private:
  explicit VulkanDevice(std::unique_ptr<VulkanLoader> loader) : loader_(std::move(loader)) {}
  Result<std::vector<VkPhysicalDevice>> Enumerate() const;
  Result<void> Open();
  Result<void> LoadFunctions();
  ImportLimits LimitsOfDevice() const;

  const std::unique_ptr<VulkanLoader> loader_;
  // Set once by Create().
  PFN_vkGetDeviceProcAddr get_device_proc_ = nullptr;
  VkPhysicalDevice physical_ = VK_NULL_HANDLE;
  VulkanDeviceFacts facts_;
  uint32_t queue_family_ = 0;
  VkQueue queue_ = VK_NULL_HANDLE;
  ImportTarget target_;
};

}  // namespace mvgpu::dma
