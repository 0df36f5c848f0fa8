#include "vmm-glue/virtio/virtio_pci_layout.h"

#include <cstddef>
#include <cstring>
#include <span>

#include "vmm-glue/virtio/common_config.h"

namespace mvgpu::glue {

namespace {

constexpr uint8_t kVendorCapabilityId = 0x09;

// cfg_type, 4.1.4
constexpr uint8_t kCommonCfg = 1;
constexpr uint8_t kNotifyCfg = 2;
constexpr uint8_t kIsrCfg = 3;
constexpr uint8_t kDeviceCfg = 4;
constexpr uint8_t kPciCfg = 5;

// struct virtio_pci_cap without its first two bytes, which every capability has, and with the one
// word that some types append.
struct CapabilityBody {
  uint8_t length_of_capability = 0;
  uint8_t cfg_type = 0;
  uint8_t bar = 0;
  uint8_t id = 0;
  uint8_t padding[2] = {};
  uint32_t offset = 0;
  uint32_t length = 0;
  uint32_t extra = 0;  // notify_off_multiplier or pci_cfg_data
} __attribute__((packed));
static_assert(sizeof(CapabilityBody) == 18 && offsetof(CapabilityBody, bar) + 2 == kWindowBar &&
              offsetof(CapabilityBody, offset) + 2 == kWindowOffset &&
              offsetof(CapabilityBody, length) + 2 == kWindowLength &&
              offsetof(CapabilityBody, extra) + 2 == kWindowData);
constexpr uint8_t kCapabilitySize = 16;
constexpr uint8_t kLongCapabilitySize = 20;

uint32_t AddVirtioCapability(ConfigSpace& space, CapabilityBody body,
                             const CapabilityBody& writable = {}) {
  const bool is_long = body.cfg_type == kNotifyCfg || body.cfg_type == kPciCfg;
  body.length_of_capability = is_long ? kLongCapabilitySize : kCapabilitySize;
  const size_t size = body.length_of_capability - size_t{2};
  return space.add_capability(kVendorCapabilityId, std::as_bytes(std::span(&body, 1)).first(size),
                              std::as_bytes(std::span(&writable, 1)).first(size));
}

void AddStructure(ConfigSpace& space, uint8_t cfg_type, uint32_t page, uint32_t length,
                  uint32_t extra = 0) {
  AddVirtioCapability(space, {.cfg_type = cfg_type,
                              .bar = kVirtioBar,
                              .offset = page * kStructurePageSize,
                              .length = length,
                              .extra = extra});
}

}  // namespace

VirtioPciConfigSpace MakeVirtioPciConfigSpace(uint16_t virtio_device_id, uint32_t class_code,
                                              uint16_t queues, uint32_t device_config_size,
                                              const Msix& msix) {
  // 4.1.2: 0x1040 plus the virtio device ID, revision 1 or higher. The subsystem is QEMU's.
  VirtioPciConfigSpace result{
      .space = ConfigSpace({.vendor_id = 0x1af4,
                            .device_id = static_cast<uint16_t>(0x1040 + virtio_device_id),
                            .revision = 1,
                            .class_code = class_code,
                            .subsystem_vendor_id = 0x1af4,
                            .subsystem_id = 0x1100})};
  ConfigSpace& space = result.space;
  space.add_bar(kMsixBar, ConfigSpace::BarKind::kMemory32, Msix::kBarSize);
  space.add_bar(kVirtioBar, ConfigSpace::BarKind::kMemory64Prefetchable, kVirtioBarSize);

  AddStructure(space, kCommonCfg, kCommonPage, CommonConfig::kSize);
  AddStructure(space, kIsrCfg, kIsrPage, 1);
  AddStructure(space, kDeviceCfg, kDevicePage, device_config_size);
  AddStructure(space, kNotifyCfg, kNotifyPage, kNotifyMultiplier * queues, kNotifyMultiplier);
  // 4.1.4.9: the driver chooses place and length, and moves the data.
  result.window = AddVirtioCapability(
      space, {.cfg_type = kPciCfg},
      {.bar = 0xff, .offset = 0xffffffff, .length = 0xffffffff, .extra = 0xffffffff});
  space.add_capability(Msix::kCapabilityId, msix.capability_body(kMsixBar),
                       Msix::CapabilityWritable());
  return result;
}

}  // namespace mvgpu::glue
