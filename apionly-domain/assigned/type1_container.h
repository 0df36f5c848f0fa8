#pragma once

// A real IOMMU, through a VFIO type1 v2 container of the kernel: one IOMMU group, and all devices
// in it, see the mappings made here. The kernel pins what is mapped and counts it as locked memory
// of this process (VmLck), also what is pinned or mapped already. An unmap is complete when the
// call returns: the kernel empties the IOMMU's caches before it lets go of the pages, so flush()
// has nothing to do.
//
// Sources: Linux, Documentation/driver-api/vfio.rst, include/uapi/linux/vfio.h.

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
class Type1Container final : public AssignedIommu {
 public:
  // `group` is the name of a file in /dev/vfio, a number. Errors: kSystem (no VFIO, no such group,
  // no access to it), kInvalid (a kernel without type1 v2, a group that is not viable), kBusy (a
  // group that somebody else uses).
  static Result<std::unique_ptr<Type1Container>> Create(
      const std::string& group, std::unique_ptr<VfioKernel> kernel = MakeVfioKernel());

  // The device of the group with this name, e.g. "0000:00:03.0": regions, interrupts, reset, as
  // VFIO_DEVICE_* on the descriptor give them. Errors: kSystem.
  Result<UniqueFd> open_device(const std::string& name);
  // How many mappings the kernel would still take; UINT64_MAX where it does not say. Errors:
  // kSystem.
  Result<uint64_t> available_mappings();

  std::string_view name() const override { return "vfio-type1"; }
  Result<void> map(IovaRange iova, std::byte* host, Access access) override;
  Result<void> unmap(IovaRange iova) override;
  void flush() override {}
  bool holds_memory() const override { return true; }
  std::span<const IovaRange> usable_ranges() const override { return usable_; }
  uint64_t page_sizes() const override { return page_sizes_; }

 private:
  // What VFIO_IOMMU_GET_INFO says.
  struct Info {
    uint64_t page_sizes = kPageSize;
    std::vector<IovaRange> usable;
    uint64_t available_mappings = UINT64_MAX;
  };
  Type1Container(std::unique_ptr<VfioKernel> kernel, std::string group)
      : kernel_(std::move(kernel)), group_name_(std::move(group)) {}
  Result<void> Open();
  Result<void> AddGroup();
  Result<Info> ReadInfo();

  const std::unique_ptr<VfioKernel> kernel_;
  const std::string group_name_;
  // The group is closed first, as it must leave the container. Both are set once by Create(), as
  // is what follows.
  UniqueFd container_;
  UniqueFd group_;
  std::vector<IovaRange> usable_;
  uint64_t page_sizes_ = 0;
};

}  // namespace mvgpu::domain
