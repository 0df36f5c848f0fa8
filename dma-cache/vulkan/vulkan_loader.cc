#include "dma-cache/vulkan/vulkan_loader.h"

#include <dlfcn.h>
#include <fmt/format.h>

#include <utility>

namespace mvgpu::dma {

namespace {

// Before 1.2 there is no vkGetBufferDeviceAddress in the core, and loaders without
// vkEnumerateInstanceVersion are 1.0.
Result<void> CheckVersion(const std::string& library, PFN_vkEnumerateInstanceVersion enumerate) {
  uint32_t version = VK_API_VERSION_1_0;
  if (enumerate != nullptr && enumerate(&version) != VK_SUCCESS) version = VK_API_VERSION_1_0;
  if (version >= VK_API_VERSION_1_2) return {};
  return Fail(ErrorCode::kSystem,
              fmt::format("vulkan loader {} speaks vulkan {}.{}, 1.2 is needed; install a newer "
                          "libvulkan1",
                          library, VK_API_VERSION_MAJOR(version), VK_API_VERSION_MINOR(version)));
}

}  // namespace

void VulkanLoader::Closer::operator()(void* library) const { dlclose(library); }

Result<std::unique_ptr<VulkanLoader>> VulkanLoader::Open(const Options& options) {
  Library library(dlopen(options.library.c_str(), RTLD_NOW | RTLD_LOCAL));
  if (library == nullptr) {
    const char* why = dlerror();
    return Fail(ErrorCode::kSystem,
                fmt::format("no vulkan on this machine ({}): install libvulkan1 and a driver, e.g. "
                            "mesa-vulkan-drivers, or choose another mapper",
                            why != nullptr ? why : options.library));
  }
  const auto get_proc =
      reinterpret_cast<PFN_vkGetInstanceProcAddr>(dlsym(library.get(), "vkGetInstanceProcAddr"));
  if (get_proc == nullptr) {
    return Fail(
        ErrorCode::kSystem,
        fmt::format("{} is not a vulkan loader: it has no vkGetInstanceProcAddr", options.library));
  }
  MVGPU_RETURN_IF_ERROR(
      CheckVersion(options.library, reinterpret_cast<PFN_vkEnumerateInstanceVersion>(
                                        get_proc(VK_NULL_HANDLE, "vkEnumerateInstanceVersion"))));

  VkApplicationInfo application = {};
  application.sType = VK_STRUCTURE_TYPE_APPLICATION_INFO;
  application.pApplicationName = "mvgpu";
  application.apiVersion = VK_API_VERSION_1_2;
  VkInstanceCreateInfo info = {};
  info.sType = VK_STRUCTURE_TYPE_INSTANCE_CREATE_INFO;
  info.pNext = options.next;
  info.pApplicationInfo = &application;
  info.enabledLayerCount = static_cast<uint32_t>(options.layers.size());
  info.ppEnabledLayerNames = options.layers.data();
  info.enabledExtensionCount = static_cast<uint32_t>(options.extensions.size());
  info.ppEnabledExtensionNames = options.extensions.data();
  const auto create =
      reinterpret_cast<PFN_vkCreateInstance>(get_proc(VK_NULL_HANDLE, "vkCreateInstance"));
  std::unique_ptr<VulkanLoader> loader(new VulkanLoader(std::move(library), get_proc));
  if (const VkResult result = create(&info, nullptr, &loader->instance_); result != VK_SUCCESS) {
    loader->instance_ = VK_NULL_HANDLE;
    return tl::unexpected<Error>(VulkanError(result, "vkCreateInstance"));
  }
  return loader;
}

VulkanLoader::~VulkanLoader() {
  if (instance_ != VK_NULL_HANDLE) {
    get<PFN_vkDestroyInstance>("vkDestroyInstance")(instance_, nullptr);
  }
}

}  // namespace mvgpu::dma
