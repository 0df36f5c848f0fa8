#pragma once

#include <dlfcn.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "apionly-domain/base/check.h"
#include "dma-cache/vulkan/vulkan_api.h"
#include "tests/fakes/fake_vulkan_device.h"

namespace mvgpu::testing {

// A graphics card as its driver describes it.
struct FakeVulkanCard {
  struct Node {
    int64_t major;
    int64_t minor;
  };

  std::string name;
  uint32_t api = VK_MAKE_API_VERSION(0, 1, 2, 0);
  std::array<uint8_t, VK_UUID_SIZE> uuid = {};
  std::optional<std::array<uint32_t, 4>> pci;  // domain, bus, device, function
  bool tells_nodes = false;                    // VK_EXT_physical_device_drm
  std::optional<Node> primary_node;
  std::optional<Node> render_node;
  bool has_host_import = true;
  bool has_device_address = true;
  bool imports_buffers = true;
  std::vector<VkMemoryPropertyFlags> memory_types = {VK_MEMORY_PROPERTY_HOST_COHERENT_BIT};
  std::vector<VkQueueFlags> queue_families = {VK_QUEUE_COMPUTE_BIT};
  uint64_t import_alignment = kPageSize;
  uint64_t largest_allocation = uint64_t{1} << 31;
  uint32_t most_allocations = 4096;
  VkResult open_result = VK_SUCCESS;

  bool is_open = false;
  std::optional<uint32_t> opened_family;
  FakeVulkanDevice device;
};

// Stands behind the library that a VulkanLoader opens: an installation of Vulkan with cards of any
// kind. What a driver must not be asked, because of its version or of an extension that it lacks,
// is a failure of the test. One at a time, for one thread.
class FakeVulkanLoader {
 public:
  explicit FakeVulkanLoader(std::string library)
      : library_(std::move(library)), handle_(dlopen(library_.c_str(), RTLD_NOW | RTLD_LOCAL)) {
    MVGPU_CHECK(handle_ != nullptr && current == nullptr);
    current = this;
    answers() = &GetInstanceProc;
  }
  ~FakeVulkanLoader() {
    EXPECT_EQ(instances, 0) << "instances are left";
    for (const auto& card : cards) {
      EXPECT_FALSE(card->is_open) << card->name;
      EXPECT_TRUE(card->device.is_empty()) << card->name;
    }
    answers() = nullptr;
    current = nullptr;
    dlclose(handle_);
  }
  FakeVulkanLoader(const FakeVulkanLoader&) = delete;
  FakeVulkanLoader& operator=(const FakeVulkanLoader&) = delete;

  FakeVulkanCard& add(std::string name) {
    cards.push_back(std::make_unique<FakeVulkanCard>());
    cards.back()->name = std::move(name);
    return *cards.back();
  }
  const std::string& library() const { return library_; }

  std::vector<std::unique_ptr<FakeVulkanCard>> cards;
  std::set<std::string> hidden;  // functions that nobody offers
  uint32_t version = VK_MAKE_API_VERSION(0, 1, 2, 0);
  VkResult version_result = VK_SUCCESS;
  VkResult instance_result = VK_SUCCESS;
  VkResult enumerate_result = VK_SUCCESS;
  uint32_t wanted_version = 0;  // by who made the last instance
  int instances = 0;            // now

 private:
  static inline FakeVulkanLoader* current = nullptr;

  PFN_vkGetInstanceProcAddr& answers() {
    auto* const pointer =
        static_cast<PFN_vkGetInstanceProcAddr*>(dlsym(handle_, "mvgpu_fake_vulkan"));
    MVGPU_CHECK(pointer != nullptr);
    return *pointer;
  }
  template <typename Function>
  static PFN_vkVoidFunction Any(Function function) {
    return reinterpret_cast<PFN_vkVoidFunction>(function);
  }
  static FakeVulkanCard& CardOf(VkPhysicalDevice device) {
    return *reinterpret_cast<FakeVulkanCard*>(device);
  }
  static FakeVulkanCard& CardOf(VkDevice device) {
    for (const auto& card : current->cards) {
      if (card->device.target().device == device) return *card;
    }
    MVGPU_CHECK(false);
  }
  static bool Speaks(const FakeVulkanCard& card, uint32_t minor) {
    return card.api >= VK_MAKE_API_VERSION(0, 1, minor, 0);
  }

  static VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL GetInstanceProc(VkInstance instance,
                                                                  const char* name) {
    if (current->hidden.contains(name)) return nullptr;
    static const std::map<std::string, PFN_vkVoidFunction> before = {
        {"vkEnumerateInstanceVersion", Any(&EnumerateVersion)},
        {"vkCreateInstance", Any(&CreateInstance)}};
    static const std::map<std::string, PFN_vkVoidFunction> after = {
        {"vkDestroyInstance", Any(&DestroyInstance)},
        {"vkEnumeratePhysicalDevices", Any(&EnumerateCards)},
        {"vkEnumerateDeviceExtensionProperties", Any(&EnumerateExtensions)},
        {"vkGetPhysicalDeviceProperties", Any(&GetProperties)},
        {"vkGetPhysicalDeviceProperties2", Any(&GetProperties2)},
        {"vkGetPhysicalDeviceFeatures2", Any(&GetFeatures2)},
        {"vkGetPhysicalDeviceExternalBufferProperties", Any(&GetExternalBuffers)},
        {"vkGetPhysicalDeviceQueueFamilyProperties", Any(&GetQueueFamilies)},
        {"vkGetPhysicalDeviceMemoryProperties", Any(&GetMemory)},
        {"vkCreateDevice", Any(&CreateDevice)},
        {"vkDestroyDevice", Any(&DestroyDevice)},
        {"vkGetDeviceProcAddr", Any(&GetDeviceProc)}};
    const auto& known = instance == VK_NULL_HANDLE ? before : after;
    const auto found = known.find(name);
    return found == known.end() ? nullptr : found->second;
  }

  static VKAPI_ATTR VkResult VKAPI_CALL EnumerateVersion(uint32_t* version) {
    *version = current->version;
    return current->version_result;
  }
  static VKAPI_ATTR VkResult VKAPI_CALL CreateInstance(const VkInstanceCreateInfo* info,
                                                       const VkAllocationCallbacks*,
                                                       VkInstance* instance) {
    if (current->instance_result != VK_SUCCESS) return current->instance_result;
    current->wanted_version = info->pApplicationInfo->apiVersion;
    ++current->instances;
    *instance = reinterpret_cast<VkInstance>(current);
    return VK_SUCCESS;
  }
  static VKAPI_ATTR void VKAPI_CALL DestroyInstance(VkInstance, const VkAllocationCallbacks*) {
    --current->instances;
  }

  // Fills an array as Vulkan does: how many there are, or as many of them as there is room for.
  template <typename T>
  static VkResult Enumerate(const std::vector<T>& all, uint32_t* count, T* out) {
    if (out != nullptr) {
      *count = std::min(*count, static_cast<uint32_t>(all.size()));
      std::copy_n(all.begin(), *count, out);
      return *count == all.size() ? VK_SUCCESS : VK_INCOMPLETE;
    }
    *count = static_cast<uint32_t>(all.size());
    return VK_SUCCESS;
  }
  static VKAPI_ATTR VkResult VKAPI_CALL EnumerateCards(VkInstance, uint32_t* count,
                                                       VkPhysicalDevice* devices) {
    if (current->enumerate_result != VK_SUCCESS) return current->enumerate_result;
    std::vector<VkPhysicalDevice> all;
    for (const auto& card : current->cards) {
      all.push_back(reinterpret_cast<VkPhysicalDevice>(card.get()));
    }
    return Enumerate(all, count, devices);
  }

  static std::vector<std::string> ExtensionsOf(const FakeVulkanCard& card) {
    std::vector<std::string> names = {"VK_EXT_external_memory_hosts"};  // another one
    if (card.pci) names.push_back(VK_EXT_PCI_BUS_INFO_EXTENSION_NAME);
    if (card.tells_nodes) names.push_back(VK_EXT_PHYSICAL_DEVICE_DRM_EXTENSION_NAME);
    if (card.has_host_import) names.push_back(VK_EXT_EXTERNAL_MEMORY_HOST_EXTENSION_NAME);
    return names;
  }
  static VKAPI_ATTR VkResult VKAPI_CALL EnumerateExtensions(VkPhysicalDevice device,
                                                            const char* layer, uint32_t* count,
                                                            VkExtensionProperties* properties) {
    EXPECT_EQ(layer, nullptr);
    std::vector<VkExtensionProperties> all;
    for (const std::string& name : ExtensionsOf(CardOf(device))) {
      VkExtensionProperties one = {};
      name.copy(one.extensionName, sizeof(one.extensionName) - 1);
      all.push_back(one);
    }
    return Enumerate(all, count, properties);
  }

  static VKAPI_ATTR void VKAPI_CALL GetProperties(VkPhysicalDevice device,
                                                  VkPhysicalDeviceProperties* properties) {
    const FakeVulkanCard& card = CardOf(device);
    *properties = {};
    properties->apiVersion = card.api;
    card.name.copy(properties->deviceName, sizeof(properties->deviceName) - 1);
    properties->limits.maxMemoryAllocationCount = card.most_allocations;
  }
  static VKAPI_ATTR void VKAPI_CALL GetProperties2(VkPhysicalDevice device,
                                                   VkPhysicalDeviceProperties2* properties) {
    const FakeVulkanCard& card = CardOf(device);
    EXPECT_TRUE(Speaks(card, 1)) << card.name;
    GetProperties(device, &properties->properties);
    for (auto* next = static_cast<VkBaseOutStructure*>(properties->pNext); next != nullptr;
         next = next->pNext) {
      AddProperties(card, next);
    }
  }
  static void AddProperties(const FakeVulkanCard& card, VkBaseOutStructure* next) {
    switch (next->sType) {
      case VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_ID_PROPERTIES:
        std::memcpy(reinterpret_cast<VkPhysicalDeviceIDProperties*>(next)->deviceUUID,
                    card.uuid.data(), VK_UUID_SIZE);
        return;
      case VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MAINTENANCE_3_PROPERTIES:
        reinterpret_cast<VkPhysicalDeviceMaintenance3Properties*>(next)->maxMemoryAllocationSize =
            card.largest_allocation;
        return;
      case VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_EXTERNAL_MEMORY_HOST_PROPERTIES_EXT:
        EXPECT_TRUE(card.has_host_import) << card.name;
        reinterpret_cast<VkPhysicalDeviceExternalMemoryHostPropertiesEXT*>(next)
            ->minImportedHostPointerAlignment = card.import_alignment;
        return;
      case VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PCI_BUS_INFO_PROPERTIES_EXT: {
        ASSERT_TRUE(card.pci.has_value()) << card.name;
        auto* pci = reinterpret_cast<VkPhysicalDevicePCIBusInfoPropertiesEXT*>(next);
        pci->pciDomain = (*card.pci)[0];
        pci->pciBus = (*card.pci)[1];
        pci->pciDevice = (*card.pci)[2];
        pci->pciFunction = (*card.pci)[3];
        return;
      }
      case VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_DRM_PROPERTIES_EXT:
        EXPECT_TRUE(card.tells_nodes) << card.name;
        AddNodes(card, reinterpret_cast<VkPhysicalDeviceDrmPropertiesEXT*>(next));
        return;
      default:
        ADD_FAILURE() << card.name << " is asked for structure " << next->sType;
    }
  }
  static void AddNodes(const FakeVulkanCard& card, VkPhysicalDeviceDrmPropertiesEXT* drm) {
    const FakeVulkanCard::Node unknown = {77, 77};  // what is not said means nothing
    const auto primary = card.primary_node.value_or(unknown);
    const auto render = card.render_node.value_or(unknown);
    drm->hasPrimary = card.primary_node ? VK_TRUE : VK_FALSE;
    drm->hasRender = card.render_node ? VK_TRUE : VK_FALSE;
    drm->primaryMajor = primary.major;
    drm->primaryMinor = primary.minor;
    drm->renderMajor = render.major;
    drm->renderMinor = render.minor;
  }

  static VKAPI_ATTR void VKAPI_CALL GetFeatures2(VkPhysicalDevice device,
                                                 VkPhysicalDeviceFeatures2* features) {
    const FakeVulkanCard& card = CardOf(device);
    EXPECT_TRUE(Speaks(card, 2)) << card.name;
    auto* features12 = static_cast<VkPhysicalDeviceVulkan12Features*>(features->pNext);
    ASSERT_EQ(features12->sType, VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_2_FEATURES);
    features12->bufferDeviceAddress = card.has_device_address ? VK_TRUE : VK_FALSE;
  }
  static VKAPI_ATTR void VKAPI_CALL
  GetExternalBuffers(VkPhysicalDevice device, const VkPhysicalDeviceExternalBufferInfo* info,
                     VkExternalBufferProperties* properties) {
    const FakeVulkanCard& card = CardOf(device);
    EXPECT_TRUE(card.has_host_import) << card.name;
    EXPECT_EQ(info->handleType, VK_EXTERNAL_MEMORY_HANDLE_TYPE_HOST_ALLOCATION_BIT_EXT);
    EXPECT_EQ(info->usage, dma::kImportedBufferUsage);
    properties->externalMemoryProperties = {};
    properties->externalMemoryProperties.externalMemoryFeatures =
        card.imports_buffers ? VK_EXTERNAL_MEMORY_FEATURE_IMPORTABLE_BIT
                             : VK_EXTERNAL_MEMORY_FEATURE_EXPORTABLE_BIT;
  }
  static VKAPI_ATTR void VKAPI_CALL GetQueueFamilies(VkPhysicalDevice device, uint32_t* count,
                                                     VkQueueFamilyProperties* properties) {
    std::vector<VkQueueFamilyProperties> all;
    for (const VkQueueFlags flags : CardOf(device).queue_families) {
      VkQueueFamilyProperties one = {};
      one.queueFlags = flags;
      one.queueCount = 1;
      all.push_back(one);
    }
    Enumerate(all, count, properties);
  }
  static VKAPI_ATTR void VKAPI_CALL GetMemory(VkPhysicalDevice device,
                                              VkPhysicalDeviceMemoryProperties* memory) {
    const FakeVulkanCard& card = CardOf(device);
    *memory = {};
    for (const VkMemoryPropertyFlags flags : card.memory_types) {
      memory->memoryTypes[memory->memoryTypeCount++].propertyFlags = flags;
    }
  }

  static VKAPI_ATTR VkResult VKAPI_CALL CreateDevice(VkPhysicalDevice physical,
                                                     const VkDeviceCreateInfo* info,
                                                     const VkAllocationCallbacks*,
                                                     VkDevice* device) {
    FakeVulkanCard& card = CardOf(physical);
    if (card.open_result != VK_SUCCESS) return card.open_result;
    const auto* features = static_cast<const VkPhysicalDeviceVulkan12Features*>(info->pNext);
    EXPECT_EQ(features->sType, VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_2_FEATURES);
    EXPECT_EQ(features->bufferDeviceAddress, VK_TRUE);
    EXPECT_EQ(info->enabledExtensionCount, 1u);
    EXPECT_STREQ(info->ppEnabledExtensionNames[0], VK_EXT_EXTERNAL_MEMORY_HOST_EXTENSION_NAME);
    card.opened_family = info->pQueueCreateInfos[0].queueFamilyIndex;
    card.is_open = true;
    *device = card.device.target().device;
    return VK_SUCCESS;
  }
  static VKAPI_ATTR void VKAPI_CALL DestroyDevice(VkDevice device, const VkAllocationCallbacks*) {
    CardOf(device).is_open = false;
  }
  static VKAPI_ATTR void VKAPI_CALL GetQueue(VkDevice device, uint32_t family, uint32_t,
                                             VkQueue* queue) {
    EXPECT_EQ(family, CardOf(device).opened_family);
    *queue = reinterpret_cast<VkQueue>(device);
  }
  static VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL GetDeviceProc(VkDevice device, const char* name) {
    if (current->hidden.contains(name)) return nullptr;
    const dma::ImportFunctions functions = CardOf(device).device.target().functions;
    const std::map<std::string, PFN_vkVoidFunction> known = {
        {"vkGetDeviceQueue", Any(&GetQueue)},
        {"vkGetMemoryHostPointerPropertiesEXT", Any(functions.get_host_pointer_properties)},
        {"vkCreateBuffer", Any(functions.create_buffer)},
        {"vkDestroyBuffer", Any(functions.destroy_buffer)},
        {"vkGetBufferMemoryRequirements", Any(functions.get_requirements)},
        {"vkAllocateMemory", Any(functions.allocate)},
        {"vkFreeMemory", Any(functions.free)},
        {"vkBindBufferMemory", Any(functions.bind)},
        {"vkGetBufferDeviceAddress", Any(functions.get_address)}};
    const auto found = known.find(name);
    return found == known.end() ? nullptr : found->second;
  }

  const std::string library_;
  void* const handle_;
};

}  // namespace mvgpu::testing
