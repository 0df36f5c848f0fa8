#pragma once

// MSI-X of a device whose VMM owns the vectors: a vector is an eventfd that the VMM bound to it.
//
// The VMM emulates the table for its guest and delivers what it finds in an eventfd wherever the
// guest wants it. Table accesses of QEMU never come here; Cloud Hypervisor and SPDK find plain
// storage. A vector that is masked, or has no eventfd, remembers that it was to fire, and fires as
// soon as it can: the interrupt of a request that ended between two bindings is not lost. Pending
// bits stay with the VMM, the PBA reads as zero.
//
// The VMM chooses the descriptors: a process that uses this ignores SIGPIPE.
//
// Not thread-safe.

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "apionly-domain/base/unique_fd.h"

namespace mvgpu::glue {

class Msix {
 public:
  static constexpr uint8_t kCapabilityId = 0x11;
  static constexpr uint32_t kTableOffset =
      0x0000;  // in its BAR; table and PBA have a page of their own,
  static constexpr uint32_t kPbaOffset = 0x1000;  // or Cloud Hypervisor doubles the BAR
  static constexpr uint32_t kBarSize = 0x2000;

  explicit Msix(uint16_t vectors);

  uint16_t vector_count() const { return static_cast<uint16_t>(vectors_.size()); }
  // What follows the capability's id and next pointer (PCI Local Bus 3.0, 6.8.2), and its writable
  // bits.
  static constexpr size_t kCapabilityBodySize = 10;
  using CapabilityBody = std::array<std::byte, kCapabilityBodySize>;
  CapabilityBody capability_body(uint8_t bar) const;
  static CapabilityBody CapabilityWritable();

  // Replaces what was bound; an invalid descriptor unbinds. REQUIRES: vector < vector_count().
  void bind(uint16_t vector, UniqueFd eventfd);
  // Unbinds all vectors and forgets what is pending; masks go too.
  void disable();
  void set_masked(uint16_t vector, bool masked);
  // Fires; a vector that does not exist (VIRTIO_MSI_NO_VECTOR, too) is ignored.
  void notify(uint16_t vector);
  // Forgets what is pending: the device was reset.
  void clear_pending();

  void read(uint64_t offset, std::span<std::byte> data) const;
  void write(uint64_t offset, std::span<const std::byte> data);
  // The table's values at power-on: all vectors masked. Bindings stay.
  void reset_table();

 private:
  struct Vector {
    UniqueFd eventfd;
    bool blocking = false;  // the VMM's descriptor would make a full counter wait
    bool masked = false;
    bool pending = false;
  };
  static void Fire(Vector& vector);

  std::vector<Vector> vectors_;
  std::vector<std::byte> table_;
};

}  // namespace mvgpu::glue
