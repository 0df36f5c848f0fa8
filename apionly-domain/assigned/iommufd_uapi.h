#pragma once

// What the kernel's iommufd and VFIO device files are asked, as far as iommufd_container.h needs
// it. Written out here because the headers of Linux 6.1, which Debian 12 has, know neither.
//
// Each structure begins with its own size, by which a kernel tells versions of it apart: a part
// that the kernel does not know must be 0 (E2BIG otherwise), so must every reserved field and flag
// (EOPNOTSUPP, EINVAL). Nothing of this is encoded in the numbers of the calls.
//
// Source: Linux 6.12, include/uapi/linux/iommufd.h and include/uapi/linux/vfio.h.

#include <sys/ioctl.h>

#include <cstdint>

namespace mvgpu::domain::uapi {

inline constexpr unsigned long kIommuDestroy = _IO(';', 0x80);
inline constexpr unsigned long kIoasAlloc = _IO(';', 0x81);
inline constexpr unsigned long kIoasIovaRanges = _IO(';', 0x84);
inline constexpr unsigned long kIoasMap = _IO(';', 0x85);
inline constexpr unsigned long kIoasUnmap = _IO(';', 0x86);
inline constexpr unsigned long kDeviceBindIommufd = _IO(';', 118);
inline constexpr unsigned long kDeviceAttachPt = _IO(';', 119);
inline constexpr unsigned long kDeviceDetachPt = _IO(';', 120);

// IOMMU_DESTROY: ends an object that nothing uses (EBUSY otherwise).
struct IommuDestroy {
  uint32_t size;
  uint32_t id;
};

// IOMMU_IOAS_ALLOC: a new address space of devices, without mappings.
struct IoasAlloc {
  uint32_t size;
  uint32_t flags;
  uint32_t out_ioas_id;
};

struct IovaRangeRecord {
  uint64_t start;
  uint64_t last;
};

// IOMMU_IOAS_IOVA_RANGES: where mappings may be; what is attached narrows it. EMSGSIZE where there
// are more ranges than `num_iovas`, which says how many then.
struct IoasIovaRanges {
  uint32_t size;
  uint32_t ioas_id;
  uint32_t num_iovas;
  uint32_t reserved;
  uint64_t allowed_iovas;  // address of the records
  uint64_t out_iova_alignment;
};

// IOMMU_IOAS_MAP
inline constexpr uint32_t kIoasMapFixedIova = 1u << 0;
inline constexpr uint32_t kIoasMapWriteable = 1u << 1;
inline constexpr uint32_t kIoasMapReadable = 1u << 2;
struct IoasMap {
  uint32_t size;
  uint32_t flags;
  uint32_t ioas_id;
  uint32_t reserved;
  uint64_t user_va;
  uint64_t length;
  uint64_t iova;
};

// IOMMU_IOAS_UNMAP: all mappings in the range, none of which it may cut. Answers how many bytes.
struct IoasUnmap {
  uint32_t size;
  uint32_t ioas_id;
  uint64_t iova;
  uint64_t length;
};

// VFIO_DEVICE_BIND_IOMMUFD: from now on the device may be used, and through this iommufd alone.
struct DeviceBindIommufd {
  uint32_t argsz;
  uint32_t flags;
  int32_t iommufd;
  uint32_t out_devid;
};

// VFIO_DEVICE_ATTACH_IOMMUFD_PT: the device sees the address space `pt_id`, which the answer
// replaces by the page table behind it.
struct DeviceAttachPt {
  uint32_t argsz;
  uint32_t flags;
  uint32_t pt_id;
};

// VFIO_DEVICE_DETACH_IOMMUFD_PT: the device sees nothing.
struct DeviceDetachPt {
  uint32_t argsz;
  uint32_t flags;
};

static_assert(kIommuDestroy == 0x3b80 && kIoasAlloc == 0x3b81 && kIoasIovaRanges == 0x3b84 &&
              kIoasMap == 0x3b85 && kIoasUnmap == 0x3b86);
static_assert(kDeviceBindIommufd == 0x3b76 && kDeviceAttachPt == 0x3b77 &&
              kDeviceDetachPt == 0x3b78);
static_assert(sizeof(IommuDestroy) == 8 && sizeof(IoasAlloc) == 12 &&
              sizeof(IovaRangeRecord) == 16 && sizeof(IoasIovaRanges) == 32 &&
              sizeof(IoasMap) == 40 && sizeof(IoasUnmap) == 24);
static_assert(sizeof(DeviceBindIommufd) == 16 && sizeof(DeviceAttachPt) == 12 &&
              sizeof(DeviceDetachPt) == 8);

}  // namespace mvgpu::domain::uapi
