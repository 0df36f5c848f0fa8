#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "apionly-domain/assigned/type1_container.h"
#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/base/unique_fd.h"

namespace mvgpu::testing {

// A PCI device of this machine, found and driven through sysfs.
struct PciDevice {
  std::string name;  // as in /sys/bus/pci/devices

  // Errors: kNotMapped when there is none.
  static Result<PciDevice> Find(const std::string& vendor, const std::string& device);
  std::string folder() const { return "/sys/bus/pci/devices/" + name; }
  // Gives it to vfio-pci; the name of its group in /dev/vfio. Errors: kSystem.
  Result<std::string> bind_to_vfio() const;
};

// QEMU's edu (docs/specs/edu.rst): a buffer of 4 KiB and an engine that copies between it and
// memory, at whatever address it is told.
class EduDevice {
 public:
  static constexpr uint64_t kBufferSize = 4096;

  // Through VFIO, or through sysfs where no driver has it. Bus mastering is on afterwards.
  static Result<std::unique_ptr<EduDevice>> Open(domain::Type1Container* container,
                                                 const PciDevice& pci);
  static Result<std::unique_ptr<EduDevice>> OpenUnbound(const PciDevice& pci);
  ~EduDevice();

  // From memory into the buffer, and from the buffer into memory; at most kBufferSize bytes. Says
  // nothing about whether the bus refused. Errors: kBusy when the engine does not end.
  Result<void> load(DmaAddr from, uint64_t size) { return Copy(from.value(), kBufferAt, size, 0); }
  Result<void> store(DmaAddr to, uint64_t size) {
    return Copy(kBufferAt, to.value(), size, kToMemory);
  }

 private:
  static constexpr uint64_t kBufferAt = 0x40000;  // in the device's own addresses
  static constexpr uint32_t kToMemory = 2;

  EduDevice(UniqueFd fd, void* registers, size_t size)
      : fd_(std::move(fd)), registers_(registers), size_(size) {}
  static Result<std::unique_ptr<EduDevice>> Map(UniqueFd fd, uint64_t offset, uint64_t size);
  Result<void> Copy(uint64_t from, uint64_t to, uint64_t size, uint32_t direction);
  template <typename T>
  volatile T& at(uint64_t offset) {
    return *reinterpret_cast<volatile T*>(static_cast<std::byte*>(registers_) + offset);
  }

  UniqueFd fd_;
  void* const registers_;
  const size_t size_;
};

}  // namespace mvgpu::testing
