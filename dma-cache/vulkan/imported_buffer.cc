#include "dma-cache/vulkan/imported_buffer.h"

#include <fmt/format.h>

#include <bit>
#include <utility>

namespace mvgpu::dma {

namespace {

constexpr VkExternalMemoryHandleTypeFlagBits kHostMemory =
    VK_EXTERNAL_MEMORY_HANDLE_TYPE_HOST_ALLOCATION_BIT_EXT;

void* PointerTo(HostRange host) {
  return reinterpret_cast<void*>(static_cast<uintptr_t>(host.start().value()));
}

std::string What(std::string_view call, uint64_t bytes) {
  return fmt::format("{} for {} KiB of guest memory", call, bytes >> 10);
}

}  // namespace

Result<ImportedBuffer> ImportedBuffer::Create(const ImportTarget* target, HostRange host,
                                              uint64_t* calls) {
  ImportedBuffer buffer(target, calls);  // its destructor undoes what was done when a step fails
  MVGPU_RETURN_IF_ERROR(buffer.CreateBuffer(host.size()));
  MVGPU_ASSIGN_OR_RETURN(const uint32_t memory_type, buffer.ChooseMemoryType(host));
  MVGPU_RETURN_IF_ERROR(buffer.Import(host, memory_type));
  MVGPU_RETURN_IF_ERROR(buffer.TakeAddress());
  return buffer;
}

ImportedBuffer::ImportedBuffer(ImportedBuffer&& other) noexcept
    : target_(other.target_),
      calls_(other.calls_),
      buffer_(std::exchange(other.buffer_, VK_NULL_HANDLE)),
      memory_(std::exchange(other.memory_, VK_NULL_HANDLE)),
      address_(other.address_) {}

ImportedBuffer::~ImportedBuffer() {
  if (buffer_ != VK_NULL_HANDLE) {
    ++*calls_;
    target_->functions.destroy_buffer(target_->device, buffer_, nullptr);
  }
  if (memory_ != VK_NULL_HANDLE) {
    ++*calls_;
    target_->functions.free(target_->device, memory_, nullptr);
  }
}

Result<void> ImportedBuffer::CreateBuffer(uint64_t size) {
  VkExternalMemoryBufferCreateInfo external = {};
  external.sType = VK_STRUCTURE_TYPE_EXTERNAL_MEMORY_BUFFER_CREATE_INFO;
  external.handleTypes = kHostMemory;
  VkBufferCreateInfo info = {};
  info.sType = VK_STRUCTURE_TYPE_BUFFER_CREATE_INFO;
  info.pNext = &external;
  info.size = size;
  info.usage = kImportedBufferUsage;
  info.sharingMode = VK_SHARING_MODE_EXCLUSIVE;
  ++*calls_;
  const VkResult result =
      target_->functions.create_buffer(target_->device, &info, nullptr, &buffer_);
  if (result == VK_SUCCESS) return {};
  buffer_ = VK_NULL_HANDLE;
  return tl::unexpected<Error>(VulkanError(result, What("vkCreateBuffer", size)));
}

Result<uint32_t> ImportedBuffer::ChooseMemoryType(HostRange host) {
  VkMemoryRequirements requirements = {};
  ++*calls_;
  target_->functions.get_requirements(target_->device, buffer_, &requirements);
  // More than was asked for would have to come from memory around the piece.
  if (requirements.size > host.size()) {
    return Fail(ErrorCode::kNotReachable,
                fmt::format("the vulkan driver wants {} bytes for a buffer over {} bytes of guest "
                            "memory; map guest memory in larger pieces",
                            requirements.size, host.size()));
  }
  VkMemoryHostPointerPropertiesEXT properties = {};
  properties.sType = VK_STRUCTURE_TYPE_MEMORY_HOST_POINTER_PROPERTIES_EXT;
  ++*calls_;
  const VkResult result = target_->functions.get_host_pointer_properties(
      target_->device, kHostMemory, PointerTo(host), &properties);
  if (result != VK_SUCCESS) {
    return tl::unexpected<Error>(
        VulkanError(result, What("vkGetMemoryHostPointerPropertiesEXT", host.size())));
  }
  const uint32_t usable = properties.memoryTypeBits & requirements.memoryTypeBits;
  const uint32_t types = usable & target_->limits.coherent_types;
  if (types == 0) {
    return Fail(ErrorCode::kNotReachable,
                fmt::format("the vulkan driver has no host-coherent memory type for guest memory: "
                            "the pointer allows {:#x}, the buffer {:#x}, coherent are {:#x}",
                            properties.memoryTypeBits, requirements.memoryTypeBits,
                            target_->limits.coherent_types));
  }
  return static_cast<uint32_t>(std::countr_zero(types));
}

Result<void> ImportedBuffer::Import(HostRange host, uint32_t memory_type) {
  VkMemoryAllocateFlagsInfo flags = {};
  flags.sType = VK_STRUCTURE_TYPE_MEMORY_ALLOCATE_FLAGS_INFO;
  flags.flags = VK_MEMORY_ALLOCATE_DEVICE_ADDRESS_BIT;
  VkImportMemoryHostPointerInfoEXT import = {};
  import.sType = VK_STRUCTURE_TYPE_IMPORT_MEMORY_HOST_POINTER_INFO_EXT;
  import.pNext = &flags;
  import.handleType = kHostMemory;
  import.pHostPointer = PointerTo(host);
  VkMemoryAllocateInfo info = {};
  info.sType = VK_STRUCTURE_TYPE_MEMORY_ALLOCATE_INFO;
  info.pNext = &import;
  info.allocationSize = host.size();
  info.memoryTypeIndex = memory_type;
  ++*calls_;
  VkResult result = target_->functions.allocate(target_->device, &info, nullptr, &memory_);
  if (result != VK_SUCCESS) {
    memory_ = VK_NULL_HANDLE;
    return tl::unexpected<Error>(VulkanError(result, What("vkAllocateMemory", host.size())));
  }
  ++*calls_;
  result = target_->functions.bind(target_->device, buffer_, memory_, 0);
  if (result == VK_SUCCESS) return {};
  return tl::unexpected<Error>(VulkanError(result, What("vkBindBufferMemory", host.size())));
}

Result<void> ImportedBuffer::TakeAddress() {
  VkBufferDeviceAddressInfo info = {};
  info.sType = VK_STRUCTURE_TYPE_BUFFER_DEVICE_ADDRESS_INFO;
  info.buffer = buffer_;
  ++*calls_;
  address_ = DmaAddr(target_->functions.get_address(target_->device, &info));
  // Pages are told by their addresses, so these must be whole ones.
  if (address_.value() != 0 && address_.is_page_aligned()) return {};
  return Fail(ErrorCode::kSystem,
              fmt::format("the vulkan driver gave {:#x} as the device address of imported memory",
                          address_.value()));
}

}  // namespace mvgpu::dma
