#pragma once

// A guest's virtio-pci driver over a VfioDevice: finds the capabilities as lspci does and
// initialises the device in the order of virtio 1.2, 3.1.1, as Linux does. All numbers are its own.

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <vector>

#include "tests/fakes/virtqueue_driver.h"
#include "vmm-glue/vfio_device.h"

namespace mvgpu::testing {

class VirtioPciDriver {
 public:
  struct Capability {
    uint8_t id = 0;
    uint32_t offset = 0;   // in configuration space
    uint8_t cfg_type = 0;  // of virtio's vendor capabilities
    uint8_t bar = 0;
    uint32_t bar_offset = 0;
    uint32_t length = 0;
  };
  enum Structure : uint8_t { kCommon = 1, kNotify = 2, kIsr = 3, kDevice = 4, kPciCfg = 5 };

  static constexpr uint64_t kVersion1 = uint64_t{1} << 32;
  static constexpr uint64_t kAccessPlatform = uint64_t{1} << 33;
  static constexpr uint64_t kIndirect = uint64_t{1} << 28;
  static constexpr uint64_t kEventIdx = uint64_t{1} << 29;

  explicit VirtioPciDriver(glue::VfioDevice* device) : device_(device) {}

  template <typename T>
  T read(uint32_t region, uint64_t offset) {
    T value{};
    device_->region_read(region, offset, std::as_writable_bytes(std::span(&value, 1)));
    return value;
  }
  template <typename T>
  void write(uint32_t region, uint64_t offset, T value) {
    device_->region_write(region, offset, std::as_bytes(std::span(&value, 1)));
  }
  template <typename T>
  T read_config(uint32_t offset) {
    return read<T>(glue::kRegionConfig, offset);
  }
  template <typename T>
  void write_config(uint32_t offset, T value) {
    write<T>(glue::kRegionConfig, offset, value);
  }

  // Walks the capability list; empty when it does not end, or leaves the space.
  std::vector<Capability> capabilities();
  // Finds the virtio structures; false when one is missing.
  bool probe();

  template <typename T>
  T get(Structure structure, uint32_t offset) {
    const Capability& c = structures_[structure];
    return read<T>(c.bar, c.bar_offset + offset);
  }
  template <typename T>
  void put(Structure structure, uint32_t offset, T value) {
    const Capability& c = structures_[structure];
    write<T>(c.bar, c.bar_offset + offset, value);
  }

  uint8_t status() { return get<uint8_t>(kCommon, 20); }
  void set_status(uint8_t value) { put<uint8_t>(kCommon, 20, value); }
  uint8_t generation() { return get<uint8_t>(kCommon, 21); }
  uint64_t device_features();
  void set_driver_features(uint64_t features);
  uint16_t queue_count() { return get<uint16_t>(kCommon, 18); }
  // The vector that the device took.
  uint16_t set_config_vector(uint16_t vector);

  // Reset, ACKNOWLEDGE, DRIVER, features, FEATURES_OK. False when the device does not keep
  // FEATURES_OK.
  bool negotiate(uint64_t features);
  uint16_t queue_size(uint16_t queue);
  // Places the rings and enables the queue. Returns the vector that the device took.
  uint16_t set_up_queue(uint16_t queue, const VirtqueueDriver& rings, uint16_t vector);
  void driver_ok() { set_status(static_cast<uint8_t>(status() | 4)); }
  void notify(uint16_t queue);
  uint8_t read_isr() { return get<uint8_t>(kIsr, 0); }

 private:
  glue::VfioDevice* const device_;
  std::map<uint8_t, Capability> structures_;  // by cfg_type
  uint32_t notify_multiplier_ = 0;
};

}  // namespace mvgpu::testing
