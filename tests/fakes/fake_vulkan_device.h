#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>

#include "apionly-domain/base/check.h"
#include "dma-cache/vulkan/imported_buffer.h"

namespace mvgpu::testing {

// Stands behind a table of Vulkan's import functions. Device addresses are its own, every handle is
// checked, memory may not be imported twice, and any call can be made to fail. For one thread at a
// time.
class FakeVulkanDevice {
 public:
  struct Memory {
    uint64_t host;
    uint64_t size;
  };
  struct Buffer {
    uint64_t size;
    uint64_t memory = 0;   // handle; 0: not bound
    uint64_t address = 0;  // 0: not asked for yet
  };

  // REQUIRES: this outlives whoever uses the target.
  dma::ImportTarget target(dma::ImportLimits limits = {}) {
    dma::ImportTarget target;
    target.device = reinterpret_cast<VkDevice>(this);
    target.functions = {&GetHostPointerProperties,
                        &CreateBuffer,
                        &DestroyBuffer,
                        &GetRequirements,
                        &Allocate,
                        &Free,
                        &Bind,
                        &GetAddress};
    target.limits = limits;
    return target;
  }

  // The imported byte at a device address; null where nothing is imported.
  std::byte* at(DmaAddr address) const {
    for (const auto& [handle, buffer] : buffers) {
      if (buffer.address == 0 || address.value() - buffer.address >= buffer.size) continue;
      const Memory& memory = memories.at(buffer.memory);
      return reinterpret_cast<std::byte*>(memory.host + (address.value() - buffer.address));
    }
    return nullptr;
  }
  bool is_empty() const { return buffers.empty() && memories.empty(); }

  std::map<uint64_t, Buffer> buffers;   // by handle
  std::map<uint64_t, Memory> memories;  // by handle
  uint64_t calls = 0;                   // all there were
  uint64_t fallible_calls = 0;          // those of them that can fail
  // The first of these that does; so do all that follow. 1 = the first ever, 0 = none.
  uint64_t fail_from_call = 0;
  VkResult failure = VK_ERROR_OUT_OF_DEVICE_MEMORY;
  std::optional<dma::HostRange> hole;  // memory that cannot be imported
  uint64_t extra_requirement = 0;      // what a buffer needs beyond its size
  uint32_t pointer_types = UINT32_MAX;
  uint64_t address_gap = 1 << 20;  // between the addresses of two imports

 private:
  static FakeVulkanDevice& Of(VkDevice device) {
    auto& self = *reinterpret_cast<FakeVulkanDevice*>(device);
    ++self.calls;
    return self;
  }
  template <typename Handle>
  static uint64_t Number(Handle handle) {
    return reinterpret_cast<uint64_t>(handle);
  }
  // The lowest ones that are free: what was given back is soon used again, as drivers do.
  uint64_t FreeAddress(uint64_t size) const {
    std::map<uint64_t, uint64_t> taken;
    for (const auto& [handle, buffer] : buffers) taken[buffer.address] = buffer.size;
    uint64_t address = uint64_t{1} << 44;
    for (const auto& [start, length] : taken) {
      if (start != 0 && start < address + size + address_gap)
        address = start + length + address_gap;
    }
    return address;
  }
  bool Fails() {
    ++fallible_calls;
    return fail_from_call != 0 && fallible_calls >= fail_from_call;
  }

  static VKAPI_ATTR VkResult VKAPI_CALL
  GetHostPointerProperties(VkDevice device, VkExternalMemoryHandleTypeFlagBits type, const void*,
                           VkMemoryHostPointerPropertiesEXT* properties) {
    FakeVulkanDevice& self = Of(device);
    MVGPU_CHECK(type == VK_EXTERNAL_MEMORY_HANDLE_TYPE_HOST_ALLOCATION_BIT_EXT);
    if (self.Fails()) return self.failure;
    properties->memoryTypeBits = self.pointer_types;
    return VK_SUCCESS;
  }

  static VKAPI_ATTR VkResult VKAPI_CALL CreateBuffer(VkDevice device,
                                                     const VkBufferCreateInfo* info,
                                                     const VkAllocationCallbacks*,
                                                     VkBuffer* buffer) {
    FakeVulkanDevice& self = Of(device);
    MVGPU_CHECK((info->usage & VK_BUFFER_USAGE_SHADER_DEVICE_ADDRESS_BIT) != 0);
    if (self.Fails()) return self.failure;
    const uint64_t handle = ++self.last_handle_;
    self.buffers.emplace(handle, Buffer{info->size});
    *buffer = reinterpret_cast<VkBuffer>(handle);
    return VK_SUCCESS;
  }

  static VKAPI_ATTR void VKAPI_CALL DestroyBuffer(VkDevice device, VkBuffer buffer,
                                                  const VkAllocationCallbacks*) {
    MVGPU_CHECK(Of(device).buffers.erase(Number(buffer)) == 1);
  }

  static VKAPI_ATTR void VKAPI_CALL GetRequirements(VkDevice device, VkBuffer buffer,
                                                    VkMemoryRequirements* requirements) {
    FakeVulkanDevice& self = Of(device);
    *requirements = {self.buffers.at(Number(buffer)).size + self.extra_requirement, kPageSize,
                     UINT32_MAX};
  }

  static VKAPI_ATTR VkResult VKAPI_CALL Allocate(VkDevice device, const VkMemoryAllocateInfo* info,
                                                 const VkAllocationCallbacks*,
                                                 VkDeviceMemory* memory) {
    FakeVulkanDevice& self = Of(device);
    const auto* import = static_cast<const VkImportMemoryHostPointerInfoEXT*>(info->pNext);
    MVGPU_CHECK(import->sType == VK_STRUCTURE_TYPE_IMPORT_MEMORY_HOST_POINTER_INFO_EXT);
    const auto* flags = static_cast<const VkMemoryAllocateFlagsInfo*>(import->pNext);
    MVGPU_CHECK(flags->flags == VK_MEMORY_ALLOCATE_DEVICE_ADDRESS_BIT);
    if (self.Fails()) return self.failure;
    const auto host = reinterpret_cast<uint64_t>(import->pHostPointer);
    const auto range = dma::HostRange::FromFirstAndLast(
        dma::HostAddr(host), dma::HostAddr(host + (info->allocationSize - 1)));
    if (self.hole && self.hole->overlaps(range)) return VK_ERROR_INVALID_EXTERNAL_HANDLE;
    for (const auto& [handle, other] : self.memories) {
      MVGPU_CHECK(host + info->allocationSize <= other.host || other.host + other.size <= host);
    }
    const uint64_t handle = ++self.last_handle_;
    self.memories.emplace(handle, Memory{host, info->allocationSize});
    *memory = reinterpret_cast<VkDeviceMemory>(handle);
    return VK_SUCCESS;
  }

  // Vulkan wants memory to live as long as a buffer is bound to it, unless the buffer is not used.
  static VKAPI_ATTR void VKAPI_CALL Free(VkDevice device, VkDeviceMemory memory,
                                         const VkAllocationCallbacks*) {
    FakeVulkanDevice& self = Of(device);
    for (const auto& [handle, buffer] : self.buffers) MVGPU_CHECK(buffer.memory != Number(memory));
    MVGPU_CHECK(self.memories.erase(Number(memory)) == 1);
  }

  static VKAPI_ATTR VkResult VKAPI_CALL Bind(VkDevice device, VkBuffer buffer,
                                             VkDeviceMemory memory, VkDeviceSize offset) {
    FakeVulkanDevice& self = Of(device);
    MVGPU_CHECK(offset == 0 && self.memories.contains(Number(memory)));
    if (self.Fails()) return self.failure;
    self.buffers.at(Number(buffer)).memory = Number(memory);
    return VK_SUCCESS;
  }

  static VKAPI_ATTR VkDeviceAddress VKAPI_CALL GetAddress(VkDevice device,
                                                          const VkBufferDeviceAddressInfo* info) {
    FakeVulkanDevice& self = Of(device);
    if (self.Fails()) return 0;
    Buffer& buffer = self.buffers.at(Number(info->buffer));
    MVGPU_CHECK(buffer.memory != 0);
    return buffer.address = self.FreeAddress(buffer.size);
  }

  uint64_t last_handle_ = 0;
};

}  // namespace mvgpu::testing
