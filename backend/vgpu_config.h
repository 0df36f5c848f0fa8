#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>

#include "apionly-domain/base/error.h"
#include "apionly-domain/pin/pin_backend.h"
#include "gpu-model/gpu_device.h"

namespace mvgpu::backend {

enum class PinMode : uint8_t { kNone, kMlock, kIoUring };
enum class DmaMode : uint8_t { kNone, kPhysical, kIommu, kVulkan };

// What a vGPU is made of. The part that its guest can notice travels with a trace (to_json), so
// that a replay builds the same device; how pages are held and mapped is the choice of whoever runs
// it.
struct VgpuConfig {
  std::string name = "vgpu0";  // of the domain, in accounts and messages
  std::string vm_uuid;         // empty: no ledger
  std::string runtime_dir;     // of ledgers; empty: the default
  PinMode pin = PinMode::kMlock;
  uint64_t pin_limit_bytes = UINT64_MAX;
  DmaMode dma = DmaMode::kNone;
  // Of memory that nobody uses and that stays pinned and mapped all the same, in whole pages; 0:
  // none does. The guest cannot notice it, but the counts of pins in a recording show it.
  uint64_t dma_idle_bytes = 0;
  // With kIommu, at most one of these; none: an IOMMU in software. Where there is one its mappings
  // hold the pages, and `pin` means nothing.
  std::string iommu_group;    // for VFIO type1
  std::string vfio_device;    // for iommufd: a PCI address
  std::string vulkan_device;  // with kVulkan, see dma::VulkanMapperOptions; empty: the first
  gpu::GpuConfig gpu;

  // How pages are held, by the name that the accounts have for it.
  std::string_view pin_backend() const;
  // Whether the kernel may move pages, pinned as they are, that a device was told the address of.
  bool pages_may_move() const { return dma == DmaMode::kPhysical && pin == PinMode::kMlock; }
  std::string to_json() const;
  // Errors: kCorrupt, naming the key.
  static Result<VgpuConfig> FromJson(std::string_view json);
};

// By the names that command lines and reports use.
const std::map<std::string, PinMode>& PinModes();
std::string_view PinModeName(PinMode mode);
// Errors: those of MakeIoUringPinBackend().
Result<std::unique_ptr<domain::PinBackend>> MakePinBackend(PinMode mode);
const std::map<std::string, DmaMode>& DmaModes();
std::string_view DmaModeName(DmaMode mode);

}  // namespace mvgpu::backend
