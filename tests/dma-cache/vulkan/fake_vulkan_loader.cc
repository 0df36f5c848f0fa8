// A library like Vulkan's loader, which asks whoever opened it: tests/fakes/fake_vulkan_loader.h.
#define VK_NO_PROTOTYPES 1
#include <vulkan/vulkan_core.h>

extern "C" {

__attribute__((visibility("default"))) PFN_vkGetInstanceProcAddr mvgpu_fake_vulkan = nullptr;

__attribute__((visibility("default"))) VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL
vkGetInstanceProcAddr(VkInstance instance, const char* name) {
  return mvgpu_fake_vulkan == nullptr ? nullptr : mvgpu_fake_vulkan(instance, name);
}

}  // extern "C"
