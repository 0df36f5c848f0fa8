#pragma once

#include <cstdint>

#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "dma-cache/vulkan/vulkan_api.h"

namespace mvgpu::dma {

// Addresses of this process; not to be dereferenced, see domain::GuestFile.
using HostAddr = Address<struct HostAddrKind>;
using HostRange = Range<HostAddr>;

// What imported memory may be used for: the source and the target of copies, and whatever a shader
// does through an address.
inline constexpr VkBufferUsageFlags kImportedBufferUsage =
    VK_BUFFER_USAGE_TRANSFER_SRC_BIT | VK_BUFFER_USAGE_TRANSFER_DST_BIT |
    VK_BUFFER_USAGE_STORAGE_BUFFER_BIT | VK_BUFFER_USAGE_SHADER_DEVICE_ADDRESS_BIT;

// The Vulkan calls of an import. A table of pointers, so that tests can put failing ones in.
struct ImportFunctions {
  PFN_vkGetMemoryHostPointerPropertiesEXT get_host_pointer_properties = nullptr;
  PFN_vkCreateBuffer create_buffer = nullptr;
  PFN_vkDestroyBuffer destroy_buffer = nullptr;
  PFN_vkGetBufferMemoryRequirements get_requirements = nullptr;
  PFN_vkAllocateMemory allocate = nullptr;
  PFN_vkFreeMemory free = nullptr;
  PFN_vkBindBufferMemory bind = nullptr;
  PFN_vkGetBufferDeviceAddress get_address = nullptr;
};

struct ImportLimits {
  uint64_t alignment = kPageSize;        // minImportedHostPointerAlignment; bytes, a power of two
  uint64_t largest_bytes = 1u << 30;     // of one import
  uint64_t most_imports = 4096;          // at a time
  uint32_t coherent_types = UINT32_MAX;  // memory types that host and device see alike; a mask
};

// Where imports go. A view: the VkDevice belongs to somebody else and outlives them.
struct ImportTarget {
  VkDevice device = VK_NULL_HANDLE;
  ImportFunctions functions;
  ImportLimits limits;
};

// Host memory that a device reaches at an address of its own: memory imported with
// VK_EXT_external_memory_host, a buffer over all of it, and the buffer's device address. Move-only;
// the destructor takes it away from the device again.
class ImportedBuffer {
 public:
  // `target` outlives the buffer; `calls` counts the Vulkan calls, those of the destructor
  // included, and outlives it, too. REQUIRES: `host` is aligned to limits.alignment at both ends.
  // Errors: kLimit, kNotReachable, kSystem; nothing is left then.
  static Result<ImportedBuffer> Create(const ImportTarget* target, HostRange host, uint64_t* calls);
  ImportedBuffer(ImportedBuffer&& other) noexcept;
  ImportedBuffer& operator=(ImportedBuffer&&) = delete;
  ImportedBuffer(const ImportedBuffer&) = delete;
  ~ImportedBuffer();

  DmaAddr address() const { return address_; }  // of the first byte

 private:
  ImportedBuffer(const ImportTarget* target, uint64_t* calls) : target_(target), calls_(calls) {}
  Result<void> CreateBuffer(uint64_t size);
  Result<uint32_t> ChooseMemoryType(HostRange host);
  Result<void> Import(HostRange host, uint32_t memory_type);
  Result<void> TakeAddress();

  const ImportTarget* target_;  // these two outlive this, see Create()
  uint64_t* calls_;
  VkBuffer buffer_ = VK_NULL_HANDLE;
  VkDeviceMemory memory_ = VK_NULL_HANDLE;
  DmaAddr address_;
};

}  // namespace mvgpu::dma
