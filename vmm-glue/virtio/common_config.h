#pragma once

// The common configuration structure of virtio-pci (virtio 1.2, 4.1.4.3) and the life of a driver
// behind it: device status, feature negotiation, the settings of each queue.
//
//   status 0            everything the driver set up is forgotten
//   ACKNOWLEDGE, DRIVER kept as they are
//   FEATURES_OK         stays only if the driver took VIRTIO_F_VERSION_1 and nothing not offered
//   DRIVER_OK           only after FEATURES_OK; the queues live from here on
//   DEVICE_NEEDS_RESET  set by the device; only status 0 takes it away
//
// A driver may access the structure with any size at any place: a field that is written in part
// keeps the rest of its bytes. What a driver may not change is ignored when written.
//
// Not thread-safe.

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "apionly-domain/base/address.h"

namespace mvgpu::glue {

// 2.1
inline constexpr uint8_t kStatusAcknowledge = 1;
inline constexpr uint8_t kStatusDriver = 2;
inline constexpr uint8_t kStatusDriverOk = 4;
inline constexpr uint8_t kStatusFeaturesOk = 8;
inline constexpr uint8_t kStatusNeedsReset = 0x40;
inline constexpr uint8_t kStatusFailed = 0x80;

// 6
inline constexpr uint64_t kFeatureIndirectDesc = uint64_t{1} << 28;
inline constexpr uint64_t kFeatureEventIdx = uint64_t{1} << 29;
inline constexpr uint64_t kFeatureVersion1 = uint64_t{1} << 32;
inline constexpr uint64_t kFeatureAccessPlatform = uint64_t{1} << 33;

inline constexpr uint16_t kNoVector = 0xffff;  // VIRTIO_MSI_NO_VECTOR

class CommonConfig {
 public:
  static constexpr uint32_t kSize =
      56;  // up to queue_device: what follows belongs to optional features

  // Told what the driver's writes mean. Outlives the structure.
  class Owner {
   public:
    virtual ~Owner() = default;
    virtual void on_features_accepted(uint64_t features) = 0;
    virtual void on_driver_ok() = 0;
    virtual void on_driver_reset() = 0;  // all fields have their first values already
  };
  struct Queue {
    uint16_t max_size = 0;
    uint16_t size = 0;
    uint16_t vector = kNoVector;
    bool enabled = false;
    Iova descriptors{};
    Iova available{};
    Iova used{};
  };

  // `vectors`: how many MSI-X vectors there are to choose from.
  CommonConfig(uint64_t offered_features, const std::vector<uint16_t>& max_queue_sizes,
               uint16_t vectors, Owner* owner);

  // Bytes beyond the structure read as zero and ignore writes.
  void read(uint64_t offset, std::span<std::byte> data) const;
  void write(uint64_t offset, std::span<const std::byte> data);
  // What status 0 does, without telling the owner.
  void reset();

  uint8_t status() const { return status_; }
  void set_needs_reset() { status_ |= kStatusNeedsReset; }
  uint64_t driver_features() const { return driver_features_; }
  uint16_t config_vector() const { return config_vector_; }
  const std::vector<Queue>& queues() const { return queues_; }
  // The device's configuration changed: a driver that is reading it starts again.
  void bump_generation() { ++generation_; }

 private:
  struct Field;
  static const Field kFields[];

  Queue* selected() { return queue_select_ < queues_.size() ? &queues_[queue_select_] : nullptr; }
  const Queue* selected() const { return const_cast<CommonConfig*>(this)->selected(); }
  // The queue whose rings may still be placed.
  Queue* configurable();

  uint32_t offered_word() const;
  uint32_t driver_word() const;
  void set_driver_word(uint32_t word);
  void set_status(uint8_t value);
  void set_queue_size(uint16_t size);
  uint16_t checked_vector(uint16_t vector) const { return vector < vectors_ ? vector : kNoVector; }

  const uint64_t offered_features_;
  const uint16_t vectors_;
  Owner* const owner_;  // outlives this, see above

  uint32_t device_feature_select_ = 0;
  uint32_t driver_feature_select_ = 0;
  uint64_t driver_features_ = 0;
  bool took_unknown_features_ = false;  // beyond the 64 that exist
  uint16_t config_vector_ = kNoVector;
  uint8_t status_ = 0;
  uint8_t generation_ = 0;
  uint16_t queue_select_ = 0;
  std::vector<Queue> queues_;
};

}  // namespace mvgpu::glue
