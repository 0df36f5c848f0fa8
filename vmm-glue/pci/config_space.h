#pragma once

// The configuration space of a PCI function as its driver and its VMM see it.
//
// It is a conventional function: 256 bytes, no PCI Express capability. That is what QEMU's own
// virtio-gpu-pci is on the root bus of q35 (an integrated endpoint needs no such capability); Linux
// and Cloud Hypervisor look at the extended space of Express functions only. Without the
// capability there is no function level reset; the VMM's reset and the driver's own (device status
// 0) are the ways to start anew.
//
// Every byte has a mask of the bits that may be written; other bits are ignored without an error,
// as in hardware. BARs are sized the PCI way: ones are written, the size mask is read back. QEMU
// keeps BAR values of its own and never reads these, Cloud Hypervisor sizes through them and leaves
// ones behind: so neither BAR values nor the command register ever decide whether a BAR access
// works.
//
// Not thread-safe.

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace mvgpu::glue {

class ConfigSpace {
 public:
  static constexpr uint32_t kSize = 256;

  struct Identity {
    uint16_t vendor_id = 0;
    uint16_t device_id = 0;
    uint8_t revision = 0;
    uint32_t class_code = 0;  // 24 bits: base class, sub-class, programming interface
    uint16_t subsystem_vendor_id = 0;
    uint16_t subsystem_id = 0;
  };
  enum class BarKind : uint8_t { kMemory32, kMemory64Prefetchable };

  explicit ConfigSpace(const Identity& identity);

  // REQUIRES: a power of two of at least one page; a 64-bit BAR takes `index + 1` as well.
  void add_bar(unsigned index, BarKind kind, uint32_t size);
  // `body` is what follows the capability's id and next pointer. Bits set in `writable`, of the
  // same length, can be changed by the driver. Returns where the capability starts.
  uint32_t add_capability(uint8_t id, std::span<const std::byte> body,
                          std::span<const std::byte> writable);

  // Offsets beyond the end read as zero and ignore writes.
  void read(uint32_t offset, std::span<std::byte> data) const;
  void write(uint32_t offset, std::span<const std::byte> data);
  // Changes bytes whatever their masks say: for registers that the device itself updates.
  void set(uint32_t offset, std::span<const std::byte> data);

  // Back to the values at power-on.
  void reset() { bytes_ = defaults_; }

 private:
  using Bytes = std::array<std::byte, kSize>;

  template <typename T>
  void Define(uint32_t offset, T value, T writable);

  Bytes bytes_{};
  Bytes defaults_{};
  Bytes writable_{};
  uint32_t next_capability_ = 0x40;  // the first byte behind the header
};

}  // namespace mvgpu::glue
