#pragma once

#include <cstddef>
#include <memory>
#include <span>

#include "apionly-domain/base/address.h"
#include "apionly-domain/container.h"
#include "dma-cache/mapper.h"
#include "tests/fakes/guest_ram.h"

namespace mvgpu::testing {

// A mapper with the device behind it, which goes to the addresses that the mapper gives.
class DmaDevice {
 public:
  virtual ~DmaDevice() = default;
  virtual dma::Mapper& mapper() = 0;
  // What the device reads there; false at a fault. REQUIRES: at most a page, whole words.
  virtual bool read(DmaAddr address, std::span<std::byte> bytes) = 0;
  // Whether it faults at what was unmapped. One that does not must not be sent there.
  virtual bool faults() const { return false; }
};

// What a device may have to know of the VM. Both outlive it.
struct DeviceSurroundings {
  GuestRam* ram;
  const domain::Container* container;
};

}  // namespace mvgpu::testing
