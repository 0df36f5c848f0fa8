#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "apionly-domain/base/error.h"
#include "apionly-domain/base/unique_fd.h"
#include "apionly-domain/container.h"

namespace mvgpu::glue {

// Region and interrupt indices of a VFIO PCI device (linux/vfio.h, VFIO_PCI_*_INDEX).
inline constexpr uint32_t kRegionBar0 = 0;
inline constexpr uint32_t kRegionRom = 6;
inline constexpr uint32_t kRegionConfig = 7;
inline constexpr uint32_t kRegionVga = 8;
inline constexpr uint32_t kRegionCount = 9;

inline constexpr uint32_t kIrqIntx = 0;
inline constexpr uint32_t kIrqMsi = 1;
inline constexpr uint32_t kIrqMsix = 2;
inline constexpr uint32_t kIrqErr = 3;
inline constexpr uint32_t kIrqReq = 4;
inline constexpr uint32_t kIrqCount = 5;

// A PCI device as VFIO sees it: regions, interrupts, a reset. What a vfio-user server serves; who
// serves it is none of its business. All calls come from one thread at a time.
class VfioDevice {
 public:
  struct RegionInfo {
    uint64_t size = 0;  // 0: the region does not exist
    bool readable = false;
    bool writable = false;
  };
  struct IrqInfo {
    uint32_t count = 0;
    bool eventfd = false;
    bool maskable = false;
    bool automasked = false;
  };

  virtual ~VfioDevice() = default;
  virtual RegionInfo region_info(uint32_t region) const = 0;  // REQUIRES: region < kRegionCount
  virtual IrqInfo irq_info(uint32_t irq) const = 0;           // REQUIRES: irq < kIrqCount

  // The server has checked that the access lies inside the region and that its direction is
  // allowed. A driver's access never fails: registers that are not there read as zero and ignore
  // writes.
  virtual void region_read(uint32_t region, uint64_t offset, std::span<std::byte> data) = 0;
  virtual void region_write(uint32_t region, uint64_t offset, std::span<const std::byte> data) = 0;

  // The server has checked start and count against irq_info().count.
  // Binds eventfds to vectors start.. (an invalid one unbinds); the ones bound before are closed.
  virtual void bind_irqs(uint32_t irq, uint32_t start, std::vector<UniqueFd> eventfds) = 0;
  // Unbinds every vector of the index.
  virtual void disable_irqs(uint32_t irq) = 0;
  // Fires a vector as the device would (VFIO_IRQ_SET_DATA_NONE / _BOOL: a loopback test).
  virtual void trigger_irq(uint32_t irq, uint32_t vector) = 0;
  virtual void set_irq_masked(uint32_t irq, uint32_t vector, bool masked) = 0;

  // Power-on state. Mappings and interrupts stay as they are.
  virtual void reset() = 0;

  virtual Result<void> dma_map(domain::Container::MapRequest request) = 0;
  // Returns the bytes unmapped; 0 when nothing was there.
  virtual Result<uint64_t> dma_unmap(Iova start, uint64_t size) = 0;
  virtual Result<uint64_t> dma_unmap_all() = 0;
};

}  // namespace mvgpu::glue
