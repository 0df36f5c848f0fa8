#include "apionly-domain/assigned/type1_container.h"

#include <fmt/format.h>
#include <linux/vfio.h>

#include <bit>
#include <cerrno>
#include <cstring>

#include "apionly-domain/pin/pin_errors.h"

namespace mvgpu::domain {

namespace {

// Reads a T out of what the kernel wrote; false when it does not lie inside.
template <typename T>
bool ReadAt(std::span<const std::byte> bytes, uint64_t offset, T* value) {
  if (offset > bytes.size() || bytes.size() - offset < sizeof(T)) return false;
  std::memcpy(value, bytes.data() + offset, sizeof(T));
  return true;
}

std::vector<IovaRange> ReadIovaRanges(std::span<const std::byte> info, uint64_t offset) {
  std::vector<IovaRange> ranges;
  vfio_iommu_type1_info_cap_iova_range head = {};
  if (!ReadAt(info, offset, &head)) return ranges;
  for (uint64_t i = 0; i < head.nr_iovas; ++i) {
    vfio_iova_range range = {};
    if (!ReadAt(info, offset + sizeof(head) + i * sizeof(range), &range)) break;
    if (range.start <= range.end) {
      ranges.push_back(IovaRange::FromFirstAndLast(Iova(range.start), Iova(range.end)));
    }
  }
  return ranges;
}

}  // namespace

Result<std::unique_ptr<Type1Container>> Type1Container::Create(const std::string& group,
                                                               std::unique_ptr<VfioKernel> kernel) {
  std::unique_ptr<Type1Container> container(new Type1Container(std::move(kernel), group));
  MVGPU_RETURN_IF_ERROR(container->Open());
  MVGPU_RETURN_IF_ERROR(container->AddGroup());
  MVGPU_ASSIGN_OR_RETURN(Info info, container->ReadInfo());
  container->usable_ = std::move(info.usable);
  container->page_sizes_ = info.page_sizes;
  return container;
}

Result<void> Type1Container::Open() {
  const int fd = kernel_->open("/dev/vfio/vfio");
  if (fd < 0) {
    return FailSystem(-fd,
                      "open of /dev/vfio/vfio (load vfio-pci and vfio_iommu_type1, and give this "
                      "user access to the file)");
  }
  container_.reset(fd);
  const int version = kernel_->ioctl(fd, VFIO_GET_API_VERSION, nullptr);
  const int has_type1 =
      kernel_->ioctl(fd, VFIO_CHECK_EXTENSION, std::bit_cast<void*>(uint64_t{VFIO_TYPE1v2_IOMMU}));
  if (version != VFIO_API_VERSION || has_type1 != 1) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("the kernel's vfio has api version {} and type1 v2: {}; needed are "
                            "version {} and the module vfio_iommu_type1",
                            version, has_type1 == 1 ? "yes" : "no", VFIO_API_VERSION));
  }
  return {};
}

Result<void> Type1Container::AddGroup() {
  const std::string path = "/dev/vfio/" + group_name_;
  const int fd = kernel_->open(path);
  if (fd == -EBUSY) {
    return Fail(ErrorCode::kBusy,
                fmt::format("iommu group {} is in use by another process", group_name_));
  }
  if (fd < 0) {
    return FailSystem(-fd, fmt::format("open of {} (bind the devices of iommu group {} to "
                                       "vfio-pci, and give this user access to the file)",
                                       path, group_name_));
  }
  group_.reset(fd);
  vfio_group_status status = {sizeof(status), 0};
  if (const int done = kernel_->ioctl(fd, VFIO_GROUP_GET_STATUS, &status); done < 0) {
    return FailSystem(-done, fmt::format("status of iommu group {}", group_name_));
  }
  if ((status.flags & VFIO_GROUP_FLAGS_VIABLE) == 0) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("iommu group {} is not viable: bind all devices in "
                            "/sys/kernel/iommu_groups/{}/devices to vfio-pci or to no driver",
                            group_name_, group_name_));
  }
  int container = container_.get();
  if (const int done = kernel_->ioctl(fd, VFIO_GROUP_SET_CONTAINER, &container); done < 0) {
    return FailSystem(-done, fmt::format("iommu group {} into a vfio container", group_name_));
  }
  const int done =
      kernel_->ioctl(container, VFIO_SET_IOMMU, std::bit_cast<void*>(uint64_t{VFIO_TYPE1v2_IOMMU}));
  if (done < 0) {
    return FailSystem(-done,
                      fmt::format("vfio type1 v2 for iommu group {} (EPERM: interrupts are not "
                                  "remapped; see vfio_iommu_type1.allow_unsafe_interrupts)",
                                  group_name_));
  }
  return {};
}

Result<Type1Container::Info> Type1Container::ReadInfo() {
  std::vector<std::byte> bytes(sizeof(vfio_iommu_type1_info));
  vfio_iommu_type1_info head = {};
  // The first call says how large the answer is, the second gets it.
  for (int call = 0; call < 2; ++call) {
    head.argsz = static_cast<uint32_t>(bytes.size());
    std::memcpy(bytes.data(), &head, sizeof(head));
    if (const int done = kernel_->ioctl(container_.get(), VFIO_IOMMU_GET_INFO, bytes.data());
        done < 0) {
      return FailSystem(-done, fmt::format("vfio type1 info of iommu group {}", group_name_));
    }
    std::memcpy(&head, bytes.data(), sizeof(head));
    if (head.argsz <= bytes.size()) break;
    bytes.assign(head.argsz, std::byte{0});
  }
  Info info;
  if ((head.flags & VFIO_IOMMU_INFO_PGSIZES) != 0) info.page_sizes = head.iova_pgsizes;
  uint64_t offset = (head.flags & VFIO_IOMMU_INFO_CAPS) != 0 ? head.cap_offset : 0;
  while (offset != 0) {
    vfio_info_cap_header cap = {};
    if (!ReadAt(bytes, offset, &cap)) break;
    vfio_iommu_type1_info_dma_avail avail = {};
    if (cap.id == VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE) {
      info.usable = ReadIovaRanges(bytes, offset);
    } else if (cap.id == VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL && ReadAt(bytes, offset, &avail)) {
      info.available_mappings = avail.avail;
    }
    if (cap.next <= offset) break;  // the list only goes forwards
    offset = cap.next;
  }
  // A kernel before 5.4 does not say; the least that an IOMMU on x86 has, without the interrupts.
  if (info.usable.empty()) {
    info.usable = {IovaRange::FromFirstAndLast(Iova(0), Iova(0xfedfffff)),
                   IovaRange::FromFirstAndLast(Iova(0xfef00000), Iova((uint64_t{1} << 39) - 1))};
  }
  return info;
}

Result<uint64_t> Type1Container::available_mappings() {
  MVGPU_ASSIGN_OR_RETURN(const Info info, ReadInfo());
  return info.available_mappings;
}

Result<UniqueFd> Type1Container::open_device(const std::string& name) {
  std::string argument = name;
  const int fd = kernel_->ioctl(group_.get(), VFIO_GROUP_GET_DEVICE_FD, argument.data());
  if (fd < 0) {
    return FailSystem(-fd, fmt::format("device {} of iommu group {}", name, group_name_));
  }
  return UniqueFd(fd);
}

Result<void> Type1Container::map(IovaRange iova, std::byte* host, Access access) {
  vfio_iommu_type1_dma_map request = {};
  request.argsz = sizeof(request);
  if (Allows(access, Access::kRead)) request.flags |= VFIO_DMA_MAP_FLAG_READ;
  if (Allows(access, Access::kWrite)) request.flags |= VFIO_DMA_MAP_FLAG_WRITE;
  request.vaddr = std::bit_cast<uint64_t>(host);
  request.iova = iova.start().value();
  request.size = iova.size();
  const int done = kernel_->ioctl(container_.get(), VFIO_IOMMU_MAP_DMA, &request);
  if (done < 0) return tl::unexpected<Error>(Type1MapError(-done, iova));
  return {};
}

Result<void> Type1Container::unmap(IovaRange iova) {
  vfio_iommu_type1_dma_unmap request = {};
  request.argsz = sizeof(request);
  request.iova = iova.start().value();
  request.size = iova.size();
  const int done = kernel_->ioctl(container_.get(), VFIO_IOMMU_UNMAP_DMA, &request);
  if (done == -EINVAL) {
    return Fail(ErrorCode::kWouldSplit, fmt::format("device iova {:#x}-{:#x} cuts a mapping",
                                                    iova.start().value(), iova.last().value()));
  }
  if (done < 0) {
    return FailSystem(-done, fmt::format("vfio unmap of {} bytes at device iova {:#x}", iova.size(),
                                         iova.start().value()));
  }
  if (request.size != iova.size()) {
    return Fail(ErrorCode::kNotMapped,
                fmt::format("of {} bytes at device iova {:#x} only {} were mapped", iova.size(),
                            iova.start().value(), request.size));
  }
  return {};
}

}  // namespace mvgpu::domain
