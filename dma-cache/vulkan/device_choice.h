#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "apionly-domain/base/error.h"

namespace mvgpu::dma {

// What a Vulkan device says about itself, as far as a choice depends on it.
struct VulkanDeviceFacts {
  std::string name;
  std::string uuid;  // 8-4-4-4-12 lower-case digits; empty: not told (Vulkan 1.0)
  std::string pci;   // 0000:01:00.0; empty: not told
  std::optional<std::pair<uint32_t, uint32_t>> render_node;  // major, minor
  uint32_t api_major = 0;
  uint32_t api_minor = 0;
  bool has_host_import = false;     // VK_EXT_external_memory_host
  bool imports_buffers = false;     // ... for a buffer whose address a shader takes
  bool has_device_address = false;  // bufferDeviceAddress
  bool has_coherent_memory = false;
  bool has_compute_queue = false;
};

// Why guest memory cannot be mapped for such a device; empty when it can.
std::string WhyUnusable(const VulkanDeviceFacts& facts);

// Which of the machine's Vulkan devices somebody wants.
class DeviceChoice {
 public:
  // Any device.
  DeviceChoice() = default;
  // A UUID (as vulkaninfo prints deviceUUID), a PCI address (with or without its domain), the path
  // of a render node, or how the device's name begins. Empty: any. Errors: kInvalid (a path that is
  // no device node).
  static Result<DeviceChoice> Parse(std::string_view text);

  bool matches(const VulkanDeviceFacts& facts) const;
  // The first device that is meant and usable. Errors: kNotReachable, one line with all devices and
  // why each was not taken.
  Result<size_t> pick(std::span<const VulkanDeviceFacts> devices) const;

 private:
  enum class By : uint8_t { kAny, kUuid, kPci, kRenderNode, kName };

  By by_ = By::kAny;
  std::string text_;
  std::pair<uint32_t, uint32_t> node_;  // with kRenderNode
};

}  // namespace mvgpu::dma
