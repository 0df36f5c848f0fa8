#pragma once

// The device through which a guest speaks coIOMMU: PCI 1234:abcd, revision 0x10, as crosvm has it.
//
//   BAR 0, registers    0x00 root of the tracking table (guest-physical, written once), 0x08
//   command,
//                       0x10 levels (written once), 0x18 + i doorbell of vCPU i, a byte each
//   BAR 2, notify map   8 bytes for each vCPU, in memory that both see: the request. The guest
//   waits
//                       until the host has made it 0, then looks into the table
//   BAR 4, topology     u16 how many, then as many u16: the devices whose DMA is tracked
//
// A request is `frame << 16 | device`, or bit 63 and the address of a batch {u16 device, 6 bytes
// unused, u64 frames, u64 frame[]}. What the guest writes is checked here; what makes no sense is
// counted, and has no effect but that the guest goes on.

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/base/mutex.h"
#include "apionly-domain/coiommu/coiommu_pins.h"

namespace mvgpu::domain {

// Thread-safe; each vCPU's doorbell is rung by one thread at a time.
class CoiommuDevice {
 public:
  static constexpr uint16_t kVendor = 0x1234;
  static constexpr uint16_t kDevice = 0xabcd;
  static constexpr uint8_t kRevision = 0x10;
  static constexpr uint64_t kRegistersSize = 0x2000;  // BAR 0, bytes
  static constexpr uint64_t kRoot = 0x00;
  static constexpr uint64_t kCommand = 0x08;
  static constexpr uint64_t kLevels = 0x10;
  static constexpr uint64_t kDoorbells = 0x18;
  enum Command : uint32_t { kDeactivate = 0, kActivate = 1, kPark = 2, kUnpark = 3 };

  struct Options {
    std::vector<uint16_t> devices;       // bus, device and function of those that are tracked
    uint64_t max_batch_pages = 1 << 16;  // larger ones are refused as a whole
  };
  struct Parts {  // all outlive the device
    ApiOnlyDomain* guest;
    CoiommuPins* pins;
    // The notify map, one word for each vCPU; shared with the guest, so it is only accessed
    // atomically.
    std::span<uint64_t> requests;
  };
  struct Counters {
    uint64_t requests = 0;
    uint64_t pages = 0;          // asked for
    uint64_t bad_requests = 0;   // an unknown device, a batch that is too large or not in memory
    uint64_t bad_registers = 0;  // accesses without a meaning
  };

  CoiommuDevice(Options options, Parts parts);

  // BAR 0. A write of a doorbell handles the vCPU's request before it returns.
  void write(uint64_t offset, uint64_t value);
  uint64_t read(uint64_t offset) const;
  // BAR 4.
  std::vector<uint16_t> topology() const;

  // What a doorbell does: handles the vCPU's request, and says so to the guest.
  void ring(size_t vcpu);

  Counters counters() const;

 private:
  bool Activate();
  // Returns how many pages were asked for; nullopt: nothing that can be served.
  std::optional<uint64_t> Handle(uint64_t request);
  std::optional<uint64_t> HandleBatch(Iova batch);
  bool IsTracked(uint16_t device) const;

  const Options options_;
  const Parts parts_;

  mutable ExclusiveMutex mutex_;
  std::optional<uint64_t> root_ ABSL_GUARDED_BY(mutex_);
  std::optional<uint32_t> levels_ ABSL_GUARDED_BY(mutex_);
  Counters counters_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace mvgpu::domain
