#pragma once

#include <memory>
#include <string>
#include <vector>

#include "apionly-domain/base/error.h"
#include "dma-cache/vulkan/vulkan_api.h"

namespace mvgpu::dma {

// The Vulkan loader, opened at run time, with one instance. Thread-safe after creation: nothing in
// it changes.
class VulkanLoader {
 public:
  // Debian's and everybody's name of the loader's ABI.
  static constexpr char kLibrary[] = "libvulkan.so.1";

  struct Options {
    std::string library = kLibrary;
    std::vector<const char*> layers;      // instance layers, e.g. for validation
    std::vector<const char*> extensions;  // instance extensions
    const void* next = nullptr;           // chained to VkInstanceCreateInfo
  };
  // Errors: kSystem, saying what to install: no loader, one older than Vulkan 1.2, no driver, a
  // layer or extension that is not there.
  static Result<std::unique_ptr<VulkanLoader>> Open(const Options& options);
  ~VulkanLoader();
  VulkanLoader(const VulkanLoader&) = delete;
  VulkanLoader& operator=(const VulkanLoader&) = delete;

  VkInstance instance() const { return instance_; }
  // A function of the instance, by its name and type; null when nobody offers it.
  template <typename Function>
  Function get(const char* name) const {
    return reinterpret_cast<Function>(get_instance_proc_(instance_, name));
  }

 private:
  struct Closer {
    void operator()(void* library) const;
  };
  using Library = std::unique_ptr<void, Closer>;

  VulkanLoader(Library library, PFN_vkGetInstanceProcAddr get_instance_proc)
      : library_(std::move(library)), get_instance_proc_(get_instance_proc) {}

  const Library library_;
  const PFN_vkGetInstanceProcAddr get_instance_proc_;
  VkInstance instance_ = VK_NULL_HANDLE;  // set once by Open()
};

}  // namespace mvgpu::dma
