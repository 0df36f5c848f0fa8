#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "apionly-domain/base/error.h"
#include "backend/scenario/world.h"
#include "vmm-glue/vfio_device.h"

namespace mvgpu::backend::scenario {

// A guest's driver of a virtio-gpu, as small as one can be (virtio 1.2, 3.1.1 and 4.1): the control
// queue, without interrupts, one request at a time. Its rings and requests are at guest-physical
// addresses, which the VMM maps for the device at the same ones.
class GpuDriver {
 public:
  static constexpr uint64_t kBytes = 2 * kPageSize;  // of memory
  static constexpr size_t kMostRequestBytes = kPageSize;

  // Both outlive this. `place` is where its memory is, page-aligned.
  GpuDriver(Guest* guest, glue::VfioDevice* device, uint64_t place)
      : guest_(*guest), device_(*device), place_(place) {}

  // Resets the device and sets it up. Errors: kInvalid (no place for the rings), kProtocol (the
  // device is none, or does not take the features).
  Result<void> boot();
  // Makes a request available and rings. Error: kBusy, one is under way. REQUIRES: it was booted;
  // the request has at most kMostRequestBytes.
  Result<void> submit(std::span<const std::byte> request);
  // The type of the response to the request under way; nullopt: there is none, or not yet.
  std::optional<uint32_t> take_response();
  bool is_waiting() const { return is_waiting_; }

 private:
  struct Structure {
    uint32_t bar;
    uint32_t offset;
  };

  template <typename T>
  T Read(uint32_t region, uint64_t offset);
  template <typename T>
  void Write(uint32_t region, uint64_t offset, T value);
  template <typename T>
  void Put(uint64_t offset, const T& value);
  bool FindStructures();
  bool Negotiate();
  void SetUpQueue();

  Guest& guest_;
  glue::VfioDevice& device_;
  const uint64_t place_;
  std::byte* memory_ = nullptr;  // at `place`
  std::optional<Structure> common_;
  std::optional<Structure> notify_;
  uint64_t doorbell_ = 0;  // offset in the notify structure's BAR
  uint32_t multiplier_ = 0;
  uint16_t requests_ = 0;  // so far: the index of the available ring
  bool is_waiting_ = false;
};

}  // namespace mvgpu::backend::scenario
