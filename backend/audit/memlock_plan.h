#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "apionly-domain/base/error.h"
#include "backend/vgpu_config.h"

// How much memory the kernel may count as locked for a VM, before it is started.
//
// The kernel has three counters and adds none to another: VmLck (locked_vm of a process: mlock,
// VFIO type1), VmPin (pinned_vm of a process: vhost-vdpa, and others that nobody compares with a
// limit), and locked_vm of a user, which /proc does not show (iommufd, io_uring). Each is compared
// by itself with RLIMIT_MEMLOCK of the process that pins. Within a counter nothing is shared:
// whoever maps memory once more is charged once more. So a process needs the largest of its
// counters.
//
// A plan has upper bounds: what a guest that does its worst can make the processes lock. It depends
// on the request only, not on the host.
namespace mvgpu::backend {

enum class DeviceKind : uint8_t {
  kVfio,     // assigned PCI device, VFIO type1
  kIommufd,  // assigned PCI device, iommufd
  kMdev,     // mediated device of a kernel driver, VFIO type1
  kVdpa,     // vhost-vdpa
  kNvme,     // NVMe driver inside the VMM (QEMU's nvme://)
  kVgpu,     // mvgpu-backend
};
inline constexpr size_t kDeviceKinds = 6;
std::string_view DeviceKindName(DeviceKind kind);

struct MemlockRequest {
  // x86-64 addresses no more than this; with the most devices, every sum fits into 64 bits.
  static constexpr uint64_t kMaxMemory = 1ull << 52;
  static constexpr uint64_t kMinMemory = 1ull << 20;
  static constexpr uint32_t kMaxDevices = 1024;

  uint64_t memory_bytes = 0;
  std::array<uint32_t, kDeviceKinds> devices = {};  // by DeviceKind
  bool viommu = false;                              // the guest has a virtual IOMMU
  bool locked = false;                              // the VMM locks all of its memory
  bool iommufd_per_process = false;                 // IOMMU_OPTION_RLIMIT_MODE
  PinMode vgpu_pin = PinMode::kMlock;
  std::optional<uint64_t> vgpu_pin_limit_bytes;  // of each vgpu

  uint32_t count(DeviceKind kind) const { return devices[static_cast<size_t>(kind)]; }
  // Adds "KIND" or "KIND=COUNT". Errors: kInvalid.
  Result<void> add_device(std::string_view text);
  // Errors: kInvalid, when a size is out of bounds or no whole number of pages.
  Result<void> check() const;
};

struct MemlockPlan {
  enum class Process : uint8_t { kVmm, kBackend };
  enum class Counter : uint8_t { kVmLck, kVmPin, kUser };

  struct Charge {
    Process process = Process::kVmm;
    Counter counter = Counter::kVmLck;
    uint64_t bytes = 0;  // by all processes of this sort together
    std::string why;
  };
  struct Limit {
    Process process = Process::kVmm;
    uint32_t processes = 1;  // so many, each of which needs `bytes`
    uint64_t bytes = 0;
    std::string why;
  };
  struct Figure {
    std::optional<uint64_t> bytes;  // nullopt: unlimited
    std::string why;
  };

  std::vector<Charge> charges;
  std::vector<Limit> limits;  // only of processes that lock something
  Figure shared;              // every page once, whoever holds it
  Figure libvirt;             // qemuDomainGetMemLockLimitBytes() for the same VM
  Figure hot_plug;            // the VMM's limit with one assigned device (VFIO type1) more

  const Limit* limit_of(Process process) const;
};

// "VMM", "backend"; "VmLck", "VmPin", "user".
std::string_view ProcessName(MemlockPlan::Process process);
std::string_view CounterName(MemlockPlan::Counter counter);

// REQUIRES: request.check() has no error.
MemlockPlan PlanMemlock(const MemlockRequest& request);

}  // namespace mvgpu::backend
