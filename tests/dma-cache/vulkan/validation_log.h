#pragma once

#include <string>
#include <vector>

#include "apionly-domain/base/check.h"
#include "dma-cache/vulkan/vulkan_loader.h"

namespace mvgpu::testing {

// Options with which the Khronos validation layer is loaded and its warnings and errors end here.
// Outlives the loader that was opened with them.
class ValidationLog {
 public:
  ValidationLog() {
    info_.sType = VK_STRUCTURE_TYPE_DEBUG_UTILS_MESSENGER_CREATE_INFO_EXT;
    info_.messageSeverity = VK_DEBUG_UTILS_MESSAGE_SEVERITY_WARNING_BIT_EXT |
                            VK_DEBUG_UTILS_MESSAGE_SEVERITY_ERROR_BIT_EXT;
    info_.messageType = VK_DEBUG_UTILS_MESSAGE_TYPE_VALIDATION_BIT_EXT |
                        VK_DEBUG_UTILS_MESSAGE_TYPE_PERFORMANCE_BIT_EXT;
    info_.pfnUserCallback = &OnMessage;
    info_.pUserData = this;
  }

  // Also what happens while the instance is made and destroyed is reported.
  dma::VulkanLoader::Options options() const {
    dma::VulkanLoader::Options options;
    options.layers = {"VK_LAYER_KHRONOS_validation"};
    options.extensions = {VK_EXT_DEBUG_UTILS_EXTENSION_NAME};
    options.next = &info_;
    return options;
  }
  // From now on also what happens in between.
  void listen(const dma::VulkanLoader& loader) {
    MVGPU_CHECK(loader.get<PFN_vkCreateDebugUtilsMessengerEXT>("vkCreateDebugUtilsMessengerEXT")(
                    loader.instance(), &info_, nullptr, &messenger_) == VK_SUCCESS);
  }
  void stop(const dma::VulkanLoader& loader) {
    loader.get<PFN_vkDestroyDebugUtilsMessengerEXT>("vkDestroyDebugUtilsMessengerEXT")(
        loader.instance(), messenger_, nullptr);
  }

  std::vector<std::string> messages;

 private:
  static VKAPI_ATTR VkBool32 VKAPI_CALL OnMessage(VkDebugUtilsMessageSeverityFlagBitsEXT,
                                                  VkDebugUtilsMessageTypeFlagsEXT,
                                                  const VkDebugUtilsMessengerCallbackDataEXT* data,
                                                  void* self) {
    static_cast<ValidationLog*>(self)->messages.emplace_back(data->pMessage);
    return VK_FALSE;
  }

  VkDebugUtilsMessengerCreateInfoEXT info_ = {};
  VkDebugUtilsMessengerEXT messenger_ = VK_NULL_HANDLE;
};

}  // namespace mvgpu::testing
