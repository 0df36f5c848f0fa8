#include "apionly-domain/assigned/iommufd_container.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <string_view>

#include "apionly-domain/assigned/iommufd_uapi.h"
#include "apionly-domain/pin/pin_errors.h"

namespace mvgpu::domain {

namespace {

constexpr std::string_view kUseType1 = "or use --iommu-group=N";
constexpr std::string_view kFolder = "/sys/bus/pci/devices/";
constexpr uint32_t kMostRanges = 4096;  // an IOMMU has a handful

// Domain, bus, device and function, as the kernel writes them: "0000:00:05.0".
bool IsPciAddress(std::string_view text) {
  constexpr std::string_view kForm = "xxxx:xx:xx.x";
  if (text.size() != kForm.size()) return false;
  for (size_t i = 0; i < text.size(); ++i) {
    const bool is_digit = (text[i] >= '0' && text[i] <= '9') || (text[i] >= 'a' && text[i] <= 'f');
    if (kForm[i] == 'x' ? !is_digit : text[i] != kForm[i]) return false;
  }
  return true;
}

template <typename T>
T Request() {
  T request = {};
  request.size = sizeof(request);
  return request;
}

}  // namespace

Result<std::unique_ptr<IommufdContainer>> IommufdContainer::Create(
    const std::string& pci_address, std::unique_ptr<VfioKernel> kernel) {
  if (!IsPciAddress(pci_address)) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("'{}' is no pci address, give one as in {}, for example 0000:00:05.0",
                            pci_address, kFolder));
  }
  std::unique_ptr<IommufdContainer> container(new IommufdContainer(std::move(kernel), pci_address));
  MVGPU_RETURN_IF_ERROR(container->OpenIommufd());
  MVGPU_RETURN_IF_ERROR(container->OpenDevice());
  MVGPU_RETURN_IF_ERROR(container->Bind());
  MVGPU_RETURN_IF_ERROR(container->Attach());
  MVGPU_RETURN_IF_ERROR(container->ReadRanges());
  return container;
}

// Closing the files would do all of this; in this order each step is one that cannot fail.
IommufdContainer::~IommufdContainer() {
  if (is_attached_) {
    uapi::DeviceDetachPt detach = {sizeof(detach), 0};
    kernel_->ioctl(device_.get(), uapi::kDeviceDetachPt, &detach);
  }
  if (ioas_id_ == 0) return;
  auto destroy = Request<uapi::IommuDestroy>();
  destroy.id = ioas_id_;
  kernel_->ioctl(iommufd_.get(), uapi::kIommuDestroy, &destroy);
}

Result<void> IommufdContainer::OpenIommufd() {
  const int fd = kernel_->open("/dev/iommu");
  if (fd == -ENOENT || fd == -ENXIO || fd == -ENODEV) {
    return FailSystem(-fd, fmt::format("open of /dev/iommu (needs Linux 6.6 or later with "
                                       "CONFIG_IOMMUFD and its module; {})",
                                       kUseType1));
  }
  if (fd < 0) return FailSystem(-fd, "open of /dev/iommu (give this user access to the file)");
  iommufd_.reset(fd);
  return {};
}

Result<std::string> IommufdContainer::FindDevice() {
  const std::string folder = std::string(kFolder) + pci_address_;
  std::vector<std::string> names;
  if (kernel_->list(folder, &names) < 0) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("there is no pci device {}; see {}", pci_address_, kFolder));
  }
  names.clear();
  const int listed = kernel_->list(folder + "/vfio-dev", &names);
  const auto name = std::find_if(names.begin(), names.end(), [](const std::string& entry) {
    return entry.starts_with("vfio") && entry.find('/') == std::string::npos;
  });
  if (listed < 0 || name == names.end()) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("pci device {} is bound to no vfio driver: bind it to vfio-pci "
                            "(driverctl set-override {} vfio-pci)",
                            pci_address_, pci_address_));
  }
  return *name;
}

Result<void> IommufdContainer::OpenDevice() {
  MVGPU_ASSIGN_OR_RETURN(const std::string name, FindDevice());
  const std::string path = "/dev/vfio/devices/" + name;
  const int fd = kernel_->open(path);
  if (fd == -ENOENT) {
    return FailSystem(-fd, fmt::format("open of {}, pci device {} (needs Linux 6.6 or later with "
                                       "CONFIG_VFIO_DEVICE_CDEV; {})",
                                       path, pci_address_, kUseType1));
  }
  if (fd < 0) {
    return FailSystem(-fd, fmt::format("open of {}, pci device {} (give this user access to the "
                                       "file)",
                                       path, pci_address_));
  }
  device_.reset(fd);
  return {};
}

Result<void> IommufdContainer::Bind() {
  uapi::DeviceBindIommufd bind = {sizeof(bind), 0, iommufd_.get(), 0};
  const int done = kernel_->ioctl(device_.get(), uapi::kDeviceBindIommufd, &bind);
  if (done == -EBUSY) {
    return Fail(ErrorCode::kBusy,
                fmt::format("pci device {} is in use, or its iommu group is, by another process or "
                            "through --iommu-group",
                            pci_address_));
  }
  if (done == -EINVAL) {
    return Fail(
        ErrorCode::kInvalid,
        fmt::format("pci device {} cannot be bound to iommufd: it needs an iommu that keeps "
                    "caches coherent, and all devices of its group bound to vfio-pci or to "
                    "no driver",
                    pci_address_));
  }
  if (done < 0) return FailSystem(-done, fmt::format("iommufd for pci device {}", pci_address_));
  return {};
}

Result<void> IommufdContainer::Attach() {
  auto alloc = Request<uapi::IoasAlloc>();
  if (const int done = kernel_->ioctl(iommufd_.get(), uapi::kIoasAlloc, &alloc); done < 0) {
    return FailSystem(-done, fmt::format("address space of pci device {}", pci_address_));
  }
  ioas_id_ = alloc.out_ioas_id;
  uapi::DeviceAttachPt attach = {sizeof(attach), 0, ioas_id_};
  if (const int done = kernel_->ioctl(device_.get(), uapi::kDeviceAttachPt, &attach); done < 0) {
    return FailSystem(
        -done, fmt::format("pci device {} into an address space of iommufd (EPERM: interrupts "
                           "are not remapped; see iommufd.allow_unsafe_interrupts)",
                           pci_address_));
  }
  is_attached_ = true;
  return {};
}

// After attaching: the device narrows them.
Result<void> IommufdContainer::ReadRanges() {
  std::vector<uapi::IovaRangeRecord> records(16);
  auto query = Request<uapi::IoasIovaRanges>();
  query.ioas_id = ioas_id_;
  for (;;) {
    query.num_iovas = static_cast<uint32_t>(records.size());
    query.allowed_iovas = std::bit_cast<uint64_t>(records.data());
    const int done = kernel_->ioctl(iommufd_.get(), uapi::kIoasIovaRanges, &query);
    if (done == 0 && query.num_iovas <= records.size()) break;
    // Only a larger number means progress.
    if (done != -EMSGSIZE || query.num_iovas <= records.size() || query.num_iovas > kMostRanges) {
      return FailSystem(done < 0 ? -done : EPROTO, fmt::format("{} iova ranges of pci device {}",
                                                               query.num_iovas, pci_address_));
    }
    records.resize(query.num_iovas);
  }
  std::vector<IovaRange> ranges;
  for (uint32_t i = 0; i < query.num_iovas; ++i) {
    if (records[i].start > records[i].last) continue;
    ranges.push_back(IovaRange::FromFirstAndLast(Iova(records[i].start), Iova(records[i].last)));
  }
  return TakeRanges(ranges, query.out_iova_alignment);
}

Result<void> IommufdContainer::TakeRanges(const std::vector<IovaRange>& ranges,
                                          uint64_t alignment) {
  if (alignment > kPageSize) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("the iommu of pci device {} maps in units of {} bytes; needed are {}",
                            pci_address_, alignment, kPageSize));
  }
  usable_ = ranges;
  return {};
}

Result<void> IommufdContainer::map(IovaRange iova, std::byte* host, Access access) {
  auto request = Request<uapi::IoasMap>();
  request.flags = uapi::kIoasMapFixedIova;
  if (Allows(access, Access::kRead)) request.flags |= uapi::kIoasMapReadable;
  if (Allows(access, Access::kWrite)) request.flags |= uapi::kIoasMapWriteable;
  request.ioas_id = ioas_id_;
  request.user_va = std::bit_cast<uint64_t>(host);
  request.length = iova.size();
  request.iova = iova.start().value();
  const int done = kernel_->ioctl(iommufd_.get(), uapi::kIoasMap, &request);
  if (done < 0) return tl::unexpected<Error>(IommufdMapError(-done, iova));
  return {};
}

Result<void> IommufdContainer::unmap(IovaRange iova) {
  auto request = Request<uapi::IoasUnmap>();
  request.ioas_id = ioas_id_;
  request.iova = iova.start().value();
  request.length = iova.size();
  const int done = kernel_->ioctl(iommufd_.get(), uapi::kIoasUnmap, &request);
  if (done == -ENOENT || (done == 0 && request.length != iova.size())) {
    return Fail(ErrorCode::kNotMapped, fmt::format("device iova {:#x}-{:#x} is not one mapping",
                                                   iova.start().value(), iova.last().value()));
  }
  if (done < 0) {
    return FailSystem(-done, fmt::format("iommufd unmap of {} bytes at device iova {:#x}",
                                         iova.size(), iova.start().value()));
  }
  return {};
}

}  // namespace mvgpu::domain
