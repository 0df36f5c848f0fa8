#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "apionly-domain/base/error.h"

namespace mvgpu::glue {

// A virtio device behind a transport: its identity, features, configuration space and what it does
// with a buffer. It never sees rings, descriptors or guest addresses of its requests. Not
// thread-safe: one thread at a time.
class VirtioDevice {
 public:
  virtual ~VirtioDevice() = default;
  virtual uint16_t device_id() const = 0;  // virtio 1.2, 5: 16 for a GPU
  virtual uint64_t features() const = 0;   // device-specific bits (0-23, 50-63) it offers
  virtual void set_driver_features(uint64_t features) = 0;
  virtual uint16_t queue_count() const = 0;
  virtual uint16_t queue_size(uint16_t queue) const = 0;  // the largest ring; a power of two

  virtual uint32_t config_size() const = 0;
  // REQUIRES: offset + data.size() <= config_size().
  virtual void read_config(uint32_t offset, std::span<std::byte> data) const = 0;
  virtual void write_config(uint32_t offset, std::span<const std::byte> data) = 0;

  // Handles one request, copied out of guest memory. `response` is as long as the guest's writable
  // part (at most the transport's limit). Returns the number of response bytes written. Errors:
  // kPending, when guest memory is not at hand: nothing was done, and the same request comes again.
  virtual Result<uint32_t> handle(uint16_t queue, std::span<const std::byte> request,
                                  std::span<std::byte> response) = 0;
  // Device status 0, or a PCI reset: everything the driver set up has gone.
  virtual void reset() = 0;
};

}  // namespace mvgpu::glue
