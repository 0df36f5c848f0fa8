#pragma once

// The Vulkan mapper for programs that may be built and run where there is no Vulkan: this header
// needs none of Vulkan's, and what it declares answers with an error and its remedy there.

#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "dma-cache/mapper.h"

namespace mvgpu::dma {

struct VulkanMapperOptions {
  // A UUID, a PCI address, the path of a render node, or how a device's name begins; empty: the
  // first device that can map guest memory.
  std::string device;
  std::string library = "libvulkan.so.1";  // the loader
  // The VMM's mapping around an IOVA; empty: unknown. Outlives the mapper.
  std::function<std::optional<IovaRange>(Iova)> mapping_at;
};

// Opens the device. Errors: kSystem (no Vulkan here), kInvalid (a device path of no use),
// kNotReachable (no such device, or none that can; lists those there are).
Result<std::unique_ptr<Mapper>> OpenVulkanMapper(const VulkanMapperOptions& options);

}  // namespace mvgpu::dma
