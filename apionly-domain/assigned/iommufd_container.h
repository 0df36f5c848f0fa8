#pragma once

// A real IOMMU, through the kernel's iommufd and the file of one VFIO device: an I/O address space
// (IOAS) of its own, to which the device is attached. Other devices of its IOMMU group see the same
// or nothing.
//
// The kernel pins what is mapped and counts it as pinned memory of this process (VmPin), every
// mapping by itself: a page at two IOVAs counts twice (only IOMMU_IOAS_COPY shares pins, which
// takes the same mapping, not the same page). RLIMIT_MEMLOCK is compared with a sum over all
// processes of the user. As with type1 a mapping goes only as a whole, and an unmap is complete
// when the call returns: the kernel empties the IOMMU's caches before it lets go of the pages.
//
// Sources: Linux, Documentation/userspace-api/iommufd.rst, Documentation/driver-api/vfio.rst
// ("IOMMUFD and vfio_iommu_type1", "VFIO device cdev").

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "apionly-domain/assigned/assigned_iommu.h"
#include "apionly-domain/assigned/vfio_kernel.h"
#include "apionly-domain/base/unique_fd.h"

namespace mvgpu::domain {

// Thread-safe: the kernel locks.
class IommufdContainer final : public AssignedIommu {
 public:
  // The device with this PCI address, e.g. "0000:00:05.0". Errors: kInvalid (no such address or
  // device, it is bound to no VFIO driver, an IOMMU that cannot do it), kBusy (somebody else uses
  // it), kSystem (a kernel without iommufd, no access to the files).
  static Result<std::unique_ptr<IommufdContainer>> Create(
      const std::string& pci_address, std::unique_ptr<VfioKernel> kernel = MakeVfioKernel());
  // REQUIRES: everything is unmapped.
  ~IommufdContainer() override;

  // Regions, interrupts and reset of the device, as VFIO_DEVICE_* on this descriptor give them.
  int device() const { return device_.get(); }

  std::string_view name() const override { return "iommufd"; }
  Result<void> map(IovaRange iova, std::byte* host, Access access) override;
  // kNotMapped also for a cut: the kernel does not tell them apart.
  Result<void> unmap(IovaRange iova) override;
  void flush() override {}
  bool holds_memory() const override { return true; }
  std::span<const IovaRange> usable_ranges() const override { return usable_; }
  // iommufd does not say which it uses: those of the IOMMUs of x86 and of Arm with 4 KiB pages.
  uint64_t page_sizes() const override { return uint64_t{1} << 12 | 1 << 21 | 1 << 30; }

 private:
  IommufdContainer(std::unique_ptr<VfioKernel> kernel, std::string pci_address)
      : kernel_(std::move(kernel)), pci_address_(std::move(pci_address)) {}
  Result<void> OpenIommufd();
  Result<void> OpenDevice();
  // The name of the device's file in /dev/vfio/devices.
  Result<std::string> FindDevice();
  Result<void> Bind();
  Result<void> Attach();
  Result<void> ReadRanges();
  Result<void> TakeRanges(const std::vector<IovaRange>& ranges, uint64_t alignment);

  const std::unique_ptr<VfioKernel> kernel_;
  const std::string pci_address_;
  // The device is closed first, which unbinds it. These and what follows are set once by Create().
  UniqueFd iommufd_;
  UniqueFd device_;
  uint32_t ioas_id_ = 0;  // 0: none, the kernel counts from 1
  bool is_attached_ = false;
  std::vector<IovaRange> usable_;
};

}  // namespace mvgpu::domain
