#include "tests/vm/dma/edu_device.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <linux/vfio.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <thread>

namespace mvgpu::testing {

namespace {

constexpr uint32_t kIdentification = 0x010000ed;
constexpr off_t kCommandRegister = 4;  // of PCI configuration space
constexpr uint16_t kMemoryAndBusMaster = 2 | 4;

std::string FirstWordOf(const std::string& path) {
  std::ifstream file(path);
  std::string word;
  file >> word;
  return word;
}

Result<void> WriteTo(const std::string& path, const std::string& text) {
  const UniqueFd fd(open(path.c_str(), O_WRONLY | O_CLOEXEC));
  if (!fd.is_valid() || write(fd.get(), text.data(), text.size()) < 0) {
    return FailSystem(errno, fmt::format("write of {} to {}", text, path));
  }
  return {};
}

// `config` is where configuration space begins in the file.
Result<void> EnableBusMastering(int fd, off_t config) {
  uint16_t command = 0;
  if (pread(fd, &command, sizeof(command), config + kCommandRegister) != sizeof(command)) {
    return FailSystem(errno, "read of the pci command register");
  }
  command = static_cast<uint16_t>(command | kMemoryAndBusMaster);
  if (pwrite(fd, &command, sizeof(command), config + kCommandRegister) != sizeof(command)) {
    return FailSystem(errno, "write of the pci command register");
  }
  return {};
}

Result<vfio_region_info> RegionInfo(int device, uint32_t index) {
  vfio_region_info info = {};
  info.argsz = sizeof(info);
  info.index = index;
  if (ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &info) != 0) {
    return FailSystem(errno, fmt::format("vfio region {}", index));
  }
  return info;
}

}  // namespace

Result<PciDevice> PciDevice::Find(const std::string& vendor, const std::string& device) {
  for (const auto& entry : std::filesystem::directory_iterator("/sys/bus/pci/devices")) {
    if (FirstWordOf(entry.path() / "vendor") == vendor &&
        FirstWordOf(entry.path() / "device") == device) {
      return PciDevice{entry.path().filename()};
    }
  }
  return Fail(ErrorCode::kNotMapped, fmt::format("no pci device {}:{}", vendor, device));
}

Result<std::string> PciDevice::bind_to_vfio() const {
  MVGPU_RETURN_IF_ERROR(WriteTo(folder() + "/driver_override", "vfio-pci"));
  MVGPU_RETURN_IF_ERROR(WriteTo("/sys/bus/pci/drivers/vfio-pci/bind", name));
  std::error_code error;
  const auto group = std::filesystem::read_symlink(folder() + "/iommu_group", error);
  if (error) return FailSystem(error.value(), fmt::format("iommu group of {}", name));
  return group.filename().string();
}

Result<std::unique_ptr<EduDevice>> EduDevice::Open(domain::Type1Container* container,
                                                   const PciDevice& pci) {
  MVGPU_ASSIGN_OR_RETURN(UniqueFd device, container->open_device(pci.name));
  MVGPU_ASSIGN_OR_RETURN(const auto config, RegionInfo(device.get(), VFIO_PCI_CONFIG_REGION_INDEX));
  MVGPU_RETURN_IF_ERROR(EnableBusMastering(device.get(), static_cast<off_t>(config.offset)));
  MVGPU_ASSIGN_OR_RETURN(const auto bar, RegionInfo(device.get(), VFIO_PCI_BAR0_REGION_INDEX));
  return Map(std::move(device), bar.offset, bar.size);
}

Result<std::unique_ptr<EduDevice>> EduDevice::OpenUnbound(const PciDevice& pci) {
  MVGPU_RETURN_IF_ERROR(WriteTo(pci.folder() + "/enable", "1"));
  const UniqueFd config(open((pci.folder() + "/config").c_str(), O_RDWR | O_CLOEXEC));
  if (!config.is_valid()) return FailSystem(errno, "open of pci configuration space");
  MVGPU_RETURN_IF_ERROR(EnableBusMastering(config.get(), 0));
  UniqueFd bar(open((pci.folder() + "/resource0").c_str(), O_RDWR | O_CLOEXEC));
  if (!bar.is_valid()) return FailSystem(errno, "open of pci resource0");
  return Map(std::move(bar), 0, uint64_t{1} << 20);
}

Result<std::unique_ptr<EduDevice>> EduDevice::Map(UniqueFd fd, uint64_t offset, uint64_t size) {
  void* registers =
      mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), static_cast<off_t>(offset));
  if (registers == MAP_FAILED) return FailSystem(errno, "mmap of edu's registers");
  std::unique_ptr<EduDevice> edu(new EduDevice(std::move(fd), registers, size));
  const uint32_t identification = edu->at<uint32_t>(0);
  if (identification != kIdentification) {
    return Fail(ErrorCode::kInvalid, fmt::format("edu says it is {:#x}", identification));
  }
  return edu;
}

EduDevice::~EduDevice() { munmap(registers_, size_); }

Result<void> EduDevice::Copy(uint64_t from, uint64_t to, uint64_t size, uint32_t direction) {
  at<uint64_t>(0x80) = from;
  at<uint64_t>(0x88) = to;
  at<uint64_t>(0x90) = size;
  at<uint64_t>(0x98) = 1 | direction;
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  while ((at<uint64_t>(0x98) & 1) != 0) {  // the engine takes 100 ms
    if (std::chrono::steady_clock::now() > deadline) {
      return Fail(ErrorCode::kBusy, fmt::format("edu does not end copying {} bytes", size));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return {};
}

}  // namespace mvgpu::testing
