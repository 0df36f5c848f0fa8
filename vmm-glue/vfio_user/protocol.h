#pragma once

// The vfio-user wire format (QEMU docs/interop/vfio-user.rst): host byte order, every message
// starts with a Header. Offsets in the comments count from the start of the payload.

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace mvgpu::glue::vfio_user {

enum class Command : uint16_t {
  kVersion = 1,
  kDmaMap = 2,
  kDmaUnmap = 3,
  kDeviceGetInfo = 4,
  kDeviceGetRegionInfo = 5,
  kDeviceGetRegionIoFds = 6,
  kDeviceGetIrqInfo = 7,
  kDeviceSetIrqs = 8,
  kRegionRead = 9,
  kRegionWrite = 10,
  kDmaRead = 11,   // server to client only
  kDmaWrite = 12,  // server to client only
  kDeviceReset = 13,
  kDirtyPages = 14,  // withdrawn
  kRegionWriteMulti = 15,
  kDeviceFeature = 16,
  kMigDataRead = 17,
  kMigDataWrite = 18,
};

constexpr std::string_view CommandName(uint16_t command) {
  switch (static_cast<Command>(command)) {
    case Command::kVersion:
      return "version";
    case Command::kDmaMap:
      return "dma_map";
    case Command::kDmaUnmap:
      return "dma_unmap";
    case Command::kDeviceGetInfo:
      return "get_info";
    case Command::kDeviceGetRegionInfo:
      return "get_region_info";
    case Command::kDeviceGetRegionIoFds:
      return "get_region_io_fds";
    case Command::kDeviceGetIrqInfo:
      return "get_irq_info";
    case Command::kDeviceSetIrqs:
      return "set_irqs";
    case Command::kRegionRead:
      return "region_read";
    case Command::kRegionWrite:
      return "region_write";
    case Command::kDmaRead:
      return "dma_read";
    case Command::kDmaWrite:
      return "dma_write";
    case Command::kDeviceReset:
      return "reset";
    case Command::kDirtyPages:
      return "dirty_pages";
    case Command::kRegionWriteMulti:
      return "region_write_multi";
    case Command::kDeviceFeature:
      return "device_feature";
    case Command::kMigDataRead:
      return "mig_data_read";
    case Command::kMigDataWrite:
      return "mig_data_write";
  }
  return "unknown";
}

struct Header {
  uint16_t id;       // chosen by the sender of the command, echoed in the reply; may repeat
  uint16_t command;  // echoed in the reply
  uint32_t size;     // of the whole message, this header included
  uint32_t flags;
  uint32_t error;  // errno, in a reply with kHeaderError
};
static_assert(sizeof(Header) == 16 && offsetof(Header, size) == 4);

inline constexpr uint32_t kHeaderTypeMask = 0xf;
inline constexpr uint32_t kHeaderTypeCommand = 0;
inline constexpr uint32_t kHeaderTypeReply = 1;
inline constexpr uint32_t kHeaderNoReply = 1u << 4;
inline constexpr uint32_t kHeaderError = 1u << 5;

inline constexpr size_t kMaxTransfer = 1u << 20;  // data of one message; negotiated
// The 32 bytes are the header and the fixed part of the longest request that carries data.
inline constexpr size_t kMaxMessageSize = kMaxTransfer + 32;
inline constexpr size_t kMaxMessageFds = 16;    // negotiated; Cloud Hypervisor sends 16 regardless
inline constexpr uint32_t kMaxDmaMaps = 65535;  // negotiated; the container's default limit
inline constexpr uint32_t kMaxArgsz = 1u << 20;

inline constexpr uint16_t kVersionMajor = 0;
inline constexpr uint16_t kVersionMinor = 1;
struct Version {  // followed by JSON and a NUL, both optional
  uint16_t major;
  uint16_t minor;
};
static_assert(sizeof(Version) == 4);

struct DmaMap {
  uint32_t argsz;
  uint32_t flags;
  uint64_t fd_offset;
  uint64_t iova;
  uint64_t size;
};
static_assert(sizeof(DmaMap) == 32 && offsetof(DmaMap, iova) == 16);
inline constexpr uint32_t kDmaMapRead = 1u << 0;
inline constexpr uint32_t kDmaMapWrite = 1u << 1;
// Extensions of libvfio-user: how the server shall reach the file. Both demand one.
inline constexpr uint32_t kDmaMapMustMmap = 1u << 2;
inline constexpr uint32_t kDmaMapFileIo = 1u << 3;

struct DmaUnmap {
  uint32_t argsz;
  uint32_t flags;
  uint64_t iova;
  uint64_t size;
};
static_assert(sizeof(DmaUnmap) == 24 && offsetof(DmaUnmap, iova) == 8);
inline constexpr uint32_t kDmaUnmapDirtyBitmap = 1u << 0;
inline constexpr uint32_t kDmaUnmapAll = 1u << 1;

struct DeviceInfo {
  uint32_t argsz;
  uint32_t flags;
  uint32_t regions;
  uint32_t irqs;
};
static_assert(sizeof(DeviceInfo) == 16);
inline constexpr uint32_t kDeviceFlagReset = 1u << 0;
inline constexpr uint32_t kDeviceFlagPci = 1u << 1;

struct RegionInfo {
  uint32_t argsz;
  uint32_t flags;
  uint32_t index;
  uint32_t cap_offset;
  uint64_t size;
  uint64_t mmap_offset;
};
static_assert(sizeof(RegionInfo) == 32 && offsetof(RegionInfo, size) == 16);
inline constexpr uint32_t kRegionFlagRead = 1u << 0;
inline constexpr uint32_t kRegionFlagWrite = 1u << 1;

struct RegionIoFds {
  uint32_t argsz;
  uint32_t flags;
  uint32_t index;
  uint32_t count;
};
static_assert(sizeof(RegionIoFds) == 16);

struct IrqInfo {
  uint32_t argsz;
  uint32_t flags;
  uint32_t index;
  uint32_t count;
};
static_assert(sizeof(IrqInfo) == 16);
inline constexpr uint32_t kIrqFlagEventfd = 1u << 0;
inline constexpr uint32_t kIrqFlagMaskable = 1u << 1;
inline constexpr uint32_t kIrqFlagAutomasked = 1u << 2;

struct SetIrqs {  // followed by `count` bytes with kIrqDataBool
  uint32_t argsz;
  uint32_t flags;
  uint32_t index;
  uint32_t start;
  uint32_t count;
};
static_assert(sizeof(SetIrqs) == 20);
inline constexpr uint32_t kIrqDataNone = 1u << 0;
inline constexpr uint32_t kIrqDataBool = 1u << 1;
inline constexpr uint32_t kIrqDataEventfd = 1u << 2;
inline constexpr uint32_t kIrqDataMask = kIrqDataNone | kIrqDataBool | kIrqDataEventfd;
inline constexpr uint32_t kIrqActionMask = 1u << 3;
inline constexpr uint32_t kIrqActionUnmask = 1u << 4;
inline constexpr uint32_t kIrqActionTrigger = 1u << 5;
inline constexpr uint32_t kIrqActionsMask = kIrqActionMask | kIrqActionUnmask | kIrqActionTrigger;

struct RegionAccess {  // followed by `count` bytes of data in a write and in the reply to a read
  uint64_t offset;
  uint32_t region;
  uint32_t count;
};
static_assert(sizeof(RegionAccess) == 16 && offsetof(RegionAccess, region) == 8);

struct DmaAccess {  // followed by `count` bytes of data in a write and in the reply to a read
  uint64_t iova;
  uint64_t count;  // QEMU before 11 has 32 bits here
};
static_assert(sizeof(DmaAccess) == 16);

struct RegionWriteMulti {  // followed by `count` SmallWrites; also the reply
  uint64_t count;
};
static_assert(sizeof(RegionWriteMulti) == 8);

struct SmallWrite {
  uint64_t offset;
  uint32_t region;
  uint32_t count;
  std::byte data[8];
};
static_assert(sizeof(SmallWrite) == 24 && offsetof(SmallWrite, data) == 16);

}  // namespace mvgpu::glue::vfio_user
