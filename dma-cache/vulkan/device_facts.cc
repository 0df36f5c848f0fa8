#include "dma-cache/vulkan/device_facts.h"

#include <fmt/format.h>

#include <cstring>
#include <string_view>

#include "dma-cache/vulkan/imported_buffer.h"

namespace mvgpu::dma {

namespace {

class Extensions {
 public:
  Extensions(const VulkanLoader& loader, VkPhysicalDevice device) {
    const auto enumerate = loader.get<PFN_vkEnumerateDeviceExtensionProperties>(
        "vkEnumerateDeviceExtensionProperties");
    uint32_t count = 0;
    if (enumerate(device, nullptr, &count, nullptr) != VK_SUCCESS) return;
    names_.resize(count);
    if (enumerate(device, nullptr, &count, names_.data()) != VK_SUCCESS) count = 0;
    names_.resize(count);
  }
  bool contain(std::string_view name) const {
    for (const VkExtensionProperties& extension : names_)
      if (name == extension.extensionName) return true;
    return false;
  }

 private:
  std::vector<VkExtensionProperties> names_;
};

std::string UuidText(const uint8_t (&uuid)[VK_UUID_SIZE]) {
  std::string text;
  for (size_t i = 0; i < VK_UUID_SIZE; ++i) {
    if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    text += fmt::format("{:02x}", uuid[i]);
  }
  return text;
}

void AddNameAndVersion(const VulkanLoader& loader, VkPhysicalDevice device,
                       VulkanDeviceFacts* facts) {
  VkPhysicalDeviceProperties properties = {};
  loader.get<PFN_vkGetPhysicalDeviceProperties>("vkGetPhysicalDeviceProperties")(device,
                                                                                 &properties);
  facts->name = properties.deviceName;
  facts->api_major = VK_API_VERSION_MAJOR(properties.apiVersion);
  facts->api_minor = VK_API_VERSION_MINOR(properties.apiVersion);
}

// Identity, and where the device sits, as far as it says. REQUIRES: Vulkan 1.1.
void AddIdentity(const VulkanLoader& loader, VkPhysicalDevice device, const Extensions& extensions,
                 VulkanDeviceFacts* facts) {
  VkPhysicalDevicePCIBusInfoPropertiesEXT pci = {};
  pci.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PCI_BUS_INFO_PROPERTIES_EXT;
  VkPhysicalDeviceDrmPropertiesEXT drm = {};
  drm.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_DRM_PROPERTIES_EXT;
  VkPhysicalDeviceIDProperties id = {};
  id.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_ID_PROPERTIES;
  const bool has_pci = extensions.contain(VK_EXT_PCI_BUS_INFO_EXTENSION_NAME);
  const bool has_drm = extensions.contain(VK_EXT_PHYSICAL_DEVICE_DRM_EXTENSION_NAME);
  if (has_pci) id.pNext = &pci;
  if (has_drm) {
    drm.pNext = id.pNext;
    id.pNext = &drm;
  }
  VkPhysicalDeviceProperties2 properties = {};
  properties.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PROPERTIES_2;
  properties.pNext = &id;
  loader.get<PFN_vkGetPhysicalDeviceProperties2>("vkGetPhysicalDeviceProperties2")(device,
                                                                                   &properties);
  facts->uuid = UuidText(id.deviceUUID);
  if (has_pci) {
    facts->pci = fmt::format("{:04x}:{:02x}:{:02x}.{:x}", pci.pciDomain, pci.pciBus, pci.pciDevice,
                             pci.pciFunction);
  }
  if (has_drm && drm.hasRender == VK_TRUE) {
    facts->render_node = {static_cast<uint32_t>(drm.renderMajor),
                          static_cast<uint32_t>(drm.renderMinor)};
  }
}

bool HasDeviceAddress(const VulkanLoader& loader, VkPhysicalDevice device) {
  VkPhysicalDeviceVulkan12Features features12 = {};
  features12.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_2_FEATURES;
  VkPhysicalDeviceFeatures2 features = {};
  features.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_FEATURES_2;
  features.pNext = &features12;
  loader.get<PFN_vkGetPhysicalDeviceFeatures2>("vkGetPhysicalDeviceFeatures2")(device, &features);
  return features12.bufferDeviceAddress == VK_TRUE;
}

bool ImportsBuffers(const VulkanLoader& loader, VkPhysicalDevice device) {
  VkPhysicalDeviceExternalBufferInfo info = {};
  info.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_EXTERNAL_BUFFER_INFO;
  info.usage = kImportedBufferUsage;
  info.handleType = VK_EXTERNAL_MEMORY_HANDLE_TYPE_HOST_ALLOCATION_BIT_EXT;
  VkExternalBufferProperties properties = {};
  properties.sType = VK_STRUCTURE_TYPE_EXTERNAL_BUFFER_PROPERTIES;
  loader.get<PFN_vkGetPhysicalDeviceExternalBufferProperties>(
      "vkGetPhysicalDeviceExternalBufferProperties")(device, &info, &properties);
  return (properties.externalMemoryProperties.externalMemoryFeatures &
          VK_EXTERNAL_MEMORY_FEATURE_IMPORTABLE_BIT) != 0;
}

}  // namespace

VulkanDeviceFacts FactsOf(const VulkanLoader& loader, VkPhysicalDevice device) {
  VulkanDeviceFacts facts;
  AddNameAndVersion(loader, device, &facts);
  // A device must not be asked what its version does not know.
  if (facts.api_major == 1 && facts.api_minor < 1) return facts;
  const Extensions extensions(loader, device);
  AddIdentity(loader, device, extensions, &facts);
  if (facts.api_major == 1 && facts.api_minor < 2) return facts;
  facts.has_host_import = extensions.contain(VK_EXT_EXTERNAL_MEMORY_HOST_EXTENSION_NAME);
  facts.has_device_address = HasDeviceAddress(loader, device);
  facts.imports_buffers = facts.has_host_import && ImportsBuffers(loader, device);
  facts.has_coherent_memory = CoherentTypesOf(loader, device) != 0;
  facts.has_compute_queue = ComputeFamilyOf(loader, device).has_value();
  return facts;
}

std::optional<uint32_t> ComputeFamilyOf(const VulkanLoader& loader, VkPhysicalDevice device) {
  const auto ask = loader.get<PFN_vkGetPhysicalDeviceQueueFamilyProperties>(
      "vkGetPhysicalDeviceQueueFamilyProperties");
  uint32_t count = 0;
  ask(device, &count, nullptr);
  std::vector<VkQueueFamilyProperties> families(count);
  ask(device, &count, families.data());
  for (uint32_t i = 0; i < count; ++i)
    if ((families[i].queueFlags & VK_QUEUE_COMPUTE_BIT) != 0) return i;
  return std::nullopt;
}

uint32_t CoherentTypesOf(const VulkanLoader& loader, VkPhysicalDevice device) {
  VkPhysicalDeviceMemoryProperties memory = {};
  loader.get<PFN_vkGetPhysicalDeviceMemoryProperties>("vkGetPhysicalDeviceMemoryProperties")(
      device, &memory);
  uint32_t types = 0;
  for (uint32_t i = 0; i < memory.memoryTypeCount; ++i) {
    if ((memory.memoryTypes[i].propertyFlags & VK_MEMORY_PROPERTY_HOST_COHERENT_BIT) != 0)
      types |= 1u << i;
  }
  return types;
}

}  // namespace mvgpu::dma
