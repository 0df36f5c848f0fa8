#pragma once

// Where a virtio-pci device has its registers. The same places as QEMU's: BAR 1 for MSI-X, BAR 4
// for the structures of virtio 1.2, 4.1.4, each on a page of its own so that a VMM could map them
// apart.

#include <cstdint>

#include "vmm-glue/pci/config_space.h"
#include "vmm-glue/pci/msix.h"

namespace mvgpu::glue {

inline constexpr uint8_t kMsixBar = 1;
inline constexpr uint8_t kVirtioBar = 4;
inline constexpr uint32_t kVirtioBarSize = 0x4000;
inline constexpr uint32_t kStructurePageSize = 0x1000;

// The structures in BAR 4, by page.
inline constexpr uint32_t kCommonPage = 0;
inline constexpr uint32_t kIsrPage = 1;
inline constexpr uint32_t kDevicePage = 2;
inline constexpr uint32_t kNotifyPage = 3;

inline constexpr uint32_t kNotifyMultiplier = 4;  // bytes per queue in the notify structure
inline constexpr uint32_t kMaxQueues = kStructurePageSize / kNotifyMultiplier;

// In the VIRTIO_PCI_CAP_PCI_CFG capability (4.1.4.9), from where it starts.
inline constexpr uint32_t kWindowBar = 4;
inline constexpr uint32_t kWindowOffset = 8;
inline constexpr uint32_t kWindowLength = 12;
inline constexpr uint32_t kWindowData = 16;
inline constexpr uint32_t kWindowDataSize = 4;

struct VirtioPciConfigSpace {
  ConfigSpace space;
  uint32_t window = 0;  // where the VIRTIO_PCI_CAP_PCI_CFG capability starts
};

// The configuration space of a modern virtio device: identity, BARs, MSI-X and virtio capabilities.
VirtioPciConfigSpace MakeVirtioPciConfigSpace(uint16_t virtio_device_id, uint32_t class_code,
                                              uint16_t queues, uint32_t device_config_size,
                                              const Msix& msix);

}  // namespace mvgpu::glue
