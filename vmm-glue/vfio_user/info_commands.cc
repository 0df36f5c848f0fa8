#include <fmt/format.h>

#include "vmm-glue/vfio_user/commands.h"
#include "vmm-glue/vfio_user/protocol.h"

namespace mvgpu::glue::vfio_user {

namespace {

Result<void> CheckIndex(const char* what, uint32_t index, uint32_t count) {
  if (index < count) return {};
  return Fail(ErrorCode::kInvalid,
              fmt::format("{} index is {}, the device has {}", what, index, count));
}

}  // namespace

// Cloud Hypervisor resets only devices that do not claim reset support (rust-vmm/vfio#171); QEMU
// resets only those that do. The claim is true, so it is made.
Result<void> GetDeviceInfo(VfioDevice&, Message& message, Payload& reply) {
  MVGPU_RETURN_IF_ERROR(ReadArguments<DeviceInfo>(message.payload));
  AppendStruct(reply, DeviceInfo{.argsz = sizeof(DeviceInfo),
                                 .flags = kDeviceFlagReset | kDeviceFlagPci,
                                 .regions = kRegionCount,
                                 .irqs = kIrqCount});
  return {};
}

// No region can be mapped by the client: no MMAP flag, no capabilities, and argsz never grows. A
// region that does not exist is described with size 0; an error would stop QEMU from realizing the
// device.
Result<void> GetRegionInfo(VfioDevice& device, Message& message, Payload& reply) {
  MVGPU_ASSIGN_OR_RETURN(const auto asked, ReadArguments<RegionInfo>(message.payload));
  MVGPU_RETURN_IF_ERROR(CheckIndex("region", asked.index, kRegionCount));
  const VfioDevice::RegionInfo info = device.region_info(asked.index);
  const uint32_t flags =
      (info.readable ? kRegionFlagRead : 0) | (info.writable ? kRegionFlagWrite : 0);
  AppendStruct(reply, RegionInfo{.argsz = sizeof(RegionInfo),
                                 .flags = info.size != 0 ? flags : 0,
                                 .index = asked.index,
                                 .cap_offset = 0,
                                 .size = info.size,
                                 .mmap_offset = 0});
  return {};
}

// No known client asks for I/O event descriptors; we offer none.
Result<void> GetRegionIoFds(VfioDevice& device, Message& message, Payload& reply) {
  MVGPU_ASSIGN_OR_RETURN(const auto asked, ReadArguments<RegionIoFds>(message.payload));
  if (asked.argsz > kMaxArgsz || asked.flags != 0 || asked.count != 0) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("argsz {} (at most {}), flags {:#x} and count {} (both must be 0)",
                            asked.argsz, kMaxArgsz, asked.flags, asked.count));
  }
  MVGPU_RETURN_IF_ERROR(CheckIndex("region", asked.index, kRegionCount));
  if (device.region_info(asked.index).size == 0) {
    return Fail(ErrorCode::kInvalid, fmt::format("region {} does not exist", asked.index));
  }
  AppendStruct(
      reply,
      RegionIoFds{.argsz = sizeof(RegionIoFds), .flags = 0, .index = asked.index, .count = 0});
  return {};
}

// NORESIZE is not set on purpose: with it QEMU disables and rebinds every vector when one is added,
// and loses the interrupts in between.
Result<void> GetIrqInfo(VfioDevice& device, Message& message, Payload& reply) {
  MVGPU_ASSIGN_OR_RETURN(const auto asked, ReadArguments<IrqInfo>(message.payload));
  MVGPU_RETURN_IF_ERROR(CheckIndex("interrupt", asked.index, kIrqCount));
  const VfioDevice::IrqInfo info = device.irq_info(asked.index);
  AppendStruct(reply, IrqInfo{.argsz = sizeof(IrqInfo),
                              .flags = (info.eventfd ? kIrqFlagEventfd : 0) |
                                       (info.maskable ? kIrqFlagMaskable : 0) |
                                       (info.automasked ? kIrqFlagAutomasked : 0),
                              .index = asked.index,
                              .count = info.count});
  return {};
}

}  // namespace mvgpu::glue::vfio_user
