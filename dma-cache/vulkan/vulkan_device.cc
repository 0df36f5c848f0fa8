#include "dma-cache/vulkan/vulkan_device.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "dma-cache/vulkan/device_facts.h"

namespace mvgpu::dma {

Result<std::unique_ptr<VulkanDevice>> VulkanDevice::Create(std::unique_ptr<VulkanLoader> loader,
                                                           const DeviceChoice& choice) {
  std::unique_ptr<VulkanDevice> device(new VulkanDevice(std::move(loader)));
  MVGPU_ASSIGN_OR_RETURN(const auto all, device->Enumerate());
  std::vector<VulkanDeviceFacts> facts;
  for (const VkPhysicalDevice one : all) facts.push_back(FactsOf(*device->loader_, one));
  MVGPU_ASSIGN_OR_RETURN(const size_t picked, choice.pick(facts));
  device->physical_ = all[picked];
  device->facts_ = std::move(facts[picked]);
  MVGPU_RETURN_IF_ERROR(device->Open());
  MVGPU_RETURN_IF_ERROR(device->LoadFunctions());
  device->target_.limits = device->LimitsOfDevice();
  return device;
}

Result<std::vector<VkPhysicalDevice>> VulkanDevice::Enumerate() const {
  const auto enumerate = loader_->get<PFN_vkEnumeratePhysicalDevices>("vkEnumeratePhysicalDevices");
  uint32_t count = 0;
  VkResult result = enumerate(loader_->instance(), &count, nullptr);
  std::vector<VkPhysicalDevice> devices(count);
  if (result == VK_SUCCESS) result = enumerate(loader_->instance(), &count, devices.data());
  if (result != VK_SUCCESS && result != VK_INCOMPLETE) {
    return tl::unexpected<Error>(VulkanError(result, "vkEnumeratePhysicalDevices"));
  }
  devices.resize(count);
  return devices;
}

Result<void> VulkanDevice::Open() {
  const std::optional<uint32_t> family = ComputeFamilyOf(*loader_, physical_);
  MVGPU_CHECK(family.has_value());  // a device without one is not picked
  queue_family_ = *family;
  const float priority = 1;
  VkDeviceQueueCreateInfo queue = {};
  queue.sType = VK_STRUCTURE_TYPE_DEVICE_QUEUE_CREATE_INFO;
  queue.queueFamilyIndex = queue_family_;
  queue.queueCount = 1;
  queue.pQueuePriorities = &priority;
  VkPhysicalDeviceVulkan12Features features = {};
  features.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_2_FEATURES;
  features.bufferDeviceAddress = VK_TRUE;
  const char* const extension = VK_EXT_EXTERNAL_MEMORY_HOST_EXTENSION_NAME;
  VkDeviceCreateInfo info = {};
  info.sType = VK_STRUCTURE_TYPE_DEVICE_CREATE_INFO;
  info.pNext = &features;
  info.queueCreateInfoCount = 1;
  info.pQueueCreateInfos = &queue;
  info.enabledExtensionCount = 1;
  info.ppEnabledExtensionNames = &extension;
  const VkResult result = loader_->get<PFN_vkCreateDevice>("vkCreateDevice")(
      physical_, &info, nullptr, &target_.device);
  if (result == VK_SUCCESS) return {};
  target_.device = VK_NULL_HANDLE;
  return tl::unexpected<Error>(VulkanError(result, "vkCreateDevice for " + facts_.name));
}

Result<void> VulkanDevice::LoadFunctions() {
  get_device_proc_ = loader_->get<PFN_vkGetDeviceProcAddr>("vkGetDeviceProcAddr");
  ImportFunctions& functions = target_.functions;
  bool has_all = true;
  const auto load = [&](const char* name, auto* function) {
    using Function = std::remove_pointer_t<decltype(function)>;
    *function = get<Function>(name);
    has_all = has_all && *function != nullptr;
  };
  load("vkGetMemoryHostPointerPropertiesEXT", &functions.get_host_pointer_properties);
  load("vkCreateBuffer", &functions.create_buffer);
  load("vkDestroyBuffer", &functions.destroy_buffer);
  load("vkGetBufferMemoryRequirements", &functions.get_requirements);
  load("vkAllocateMemory", &functions.allocate);
  load("vkFreeMemory", &functions.free);
  load("vkBindBufferMemory", &functions.bind);
  load("vkGetBufferDeviceAddress", &functions.get_address);
  if (!has_all) {
    return Fail(ErrorCode::kSystem, "the vulkan driver of " + facts_.name +
                                        " does not offer the functions of its own extensions; "
                                        "install another version of it");
  }
  get<PFN_vkGetDeviceQueue>("vkGetDeviceQueue")(target_.device, queue_family_, 0, &queue_);
  return {};
}

ImportLimits VulkanDevice::LimitsOfDevice() const {
  VkPhysicalDeviceExternalMemoryHostPropertiesEXT host = {};
  host.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_EXTERNAL_MEMORY_HOST_PROPERTIES_EXT;
  VkPhysicalDeviceMaintenance3Properties maintenance = {};
  maintenance.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MAINTENANCE_3_PROPERTIES;
  maintenance.pNext = &host;
  VkPhysicalDeviceProperties2 properties = {};
  properties.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PROPERTIES_2;
  properties.pNext = &maintenance;
  loader_->get<PFN_vkGetPhysicalDeviceProperties2>("vkGetPhysicalDeviceProperties2")(physical_,
                                                                                     &properties);
  ImportLimits limits;
  limits.alignment = std::max<uint64_t>(kPageSize, host.minImportedHostPointerAlignment);
  // maxBufferSize is known from 1.3 on only; no driver is known to have less than 1 GiB.
  limits.largest_bytes =
      std::min<uint64_t>(limits.largest_bytes, maintenance.maxMemoryAllocationSize);
  // A sixteenth is left for whoever else allocates on this device.
  const uint64_t allocations = properties.properties.limits.maxMemoryAllocationCount;
  limits.most_imports = std::max<uint64_t>(1, allocations - allocations / 16);
  limits.coherent_types = CoherentTypesOf(*loader_, physical_);
  return limits;
}

VulkanDevice::~VulkanDevice() {
  if (target_.device != VK_NULL_HANDLE) {
    loader_->get<PFN_vkDestroyDevice>("vkDestroyDevice")(target_.device, nullptr);
  }
}

}  // namespace mvgpu::dma
