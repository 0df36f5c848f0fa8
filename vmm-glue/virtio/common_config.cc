#include "vmm-glue/virtio/common_config.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

namespace mvgpu::glue {

// One field of struct virtio_pci_common_cfg. A null `set` is a field that the driver only reads.
struct CommonConfig::Field {
  uint32_t offset;
  uint32_t size;
  uint64_t (*get)(const CommonConfig&);
  void (*set)(CommonConfig&, uint64_t);

  bool overlaps(uint64_t start, uint64_t count) const {
    return start < offset + size && offset < start + count;
  }
};

// 4.1.4.3, in the order of the structure. Values that a wrong queue_select would ask for read as
// zero.
const CommonConfig::Field CommonConfig::kFields[] = {
    // device_feature_select, device_feature, driver_feature_select, driver_feature
    {0, 4, [](const CommonConfig& c) -> uint64_t { return c.device_feature_select_; },
     [](CommonConfig& c, uint64_t v) { c.device_feature_select_ = static_cast<uint32_t>(v); }},
    {4, 4, [](const CommonConfig& c) -> uint64_t { return c.offered_word(); }, nullptr},
    {8, 4, [](const CommonConfig& c) -> uint64_t { return c.driver_feature_select_; },
     [](CommonConfig& c, uint64_t v) { c.driver_feature_select_ = static_cast<uint32_t>(v); }},
    {12, 4, [](const CommonConfig& c) -> uint64_t { return c.driver_word(); },
     [](CommonConfig& c, uint64_t v) { c.set_driver_word(static_cast<uint32_t>(v)); }},
    // config_msix_vector, num_queues, device_status, config_generation, queue_select
    {16, 2, [](const CommonConfig& c) -> uint64_t { return c.config_vector_; },
     [](CommonConfig& c, uint64_t v) {
       c.config_vector_ = c.checked_vector(static_cast<uint16_t>(v));
     }},
    {18, 2, [](const CommonConfig& c) -> uint64_t { return c.queues_.size(); }, nullptr},
    {20, 1, [](const CommonConfig& c) -> uint64_t { return c.status_; },
     [](CommonConfig& c, uint64_t v) { c.set_status(static_cast<uint8_t>(v)); }},
    {21, 1, [](const CommonConfig& c) -> uint64_t { return c.generation_; }, nullptr},
    {22, 2, [](const CommonConfig& c) -> uint64_t { return c.queue_select_; },
     [](CommonConfig& c, uint64_t v) { c.queue_select_ = static_cast<uint16_t>(v); }},
    // queue_size, queue_msix_vector, queue_enable, queue_notify_off
    {24, 2, [](const CommonConfig& c) -> uint64_t { return c.selected() ? c.selected()->size : 0; },
     [](CommonConfig& c, uint64_t v) { c.set_queue_size(static_cast<uint16_t>(v)); }},
    {26, 2,
     [](const CommonConfig& c) -> uint64_t {
       return c.selected() ? c.selected()->vector : kNoVector;
     },
     [](CommonConfig& c, uint64_t v) {
       if (c.selected()) c.selected()->vector = c.checked_vector(static_cast<uint16_t>(v));
     }},
    {28, 2, [](const CommonConfig& c) -> uint64_t { return c.selected() && c.selected()->enabled; },
     [](CommonConfig& c, uint64_t v) {
       if (c.selected() && v == 1) c.selected()->enabled = true;  // 4.1.4.3.2: never written with 0
     }},
    {30, 2, [](const CommonConfig& c) -> uint64_t { return c.selected() ? c.queue_select_ : 0; },
     nullptr},
    // queue_desc, queue_driver, queue_device
    {32, 8,
     [](const CommonConfig& c) { return c.selected() ? c.selected()->descriptors.value() : 0; },
     [](CommonConfig& c, uint64_t v) {
       if (c.configurable()) c.configurable()->descriptors = Iova(v);
     }},
    {40, 8,
     [](const CommonConfig& c) { return c.selected() ? c.selected()->available.value() : 0; },
     [](CommonConfig& c, uint64_t v) {
       if (c.configurable()) c.configurable()->available = Iova(v);
     }},
    {48, 8, [](const CommonConfig& c) { return c.selected() ? c.selected()->used.value() : 0; },
     [](CommonConfig& c, uint64_t v) {
       if (c.configurable()) c.configurable()->used = Iova(v);
     }},
};

CommonConfig::CommonConfig(uint64_t offered_features, const std::vector<uint16_t>& max_queue_sizes,
                           uint16_t vectors, Owner* owner)
    : offered_features_(offered_features), vectors_(vectors), owner_(owner) {
  for (const uint16_t size : max_queue_sizes) queues_.push_back({.max_size = size});
  reset();
}

void CommonConfig::reset() {
  device_feature_select_ = 0;
  driver_feature_select_ = 0;
  driver_features_ = 0;
  took_unknown_features_ = false;
  config_vector_ = kNoVector;
  status_ = 0;
  queue_select_ = 0;
  for (Queue& queue : queues_) queue = {.max_size = queue.max_size, .size = queue.max_size};
}

void CommonConfig::read(uint64_t offset, std::span<std::byte> data) const {
  std::array<std::byte, kSize> image{};
  for (const Field& field : kFields) {
    if (!field.overlaps(offset, data.size())) continue;
    const uint64_t value = field.get(*this);
    std::memcpy(&image[field.offset], &value, field.size);
  }
  std::fill(data.begin(), data.end(), std::byte{0});
  if (offset >= kSize) return;
  std::copy_n(image.begin() + static_cast<ptrdiff_t>(offset),
              std::min<uint64_t>(data.size(), kSize - offset), data.begin());
}

void CommonConfig::write(uint64_t offset, std::span<const std::byte> data) {
  for (const Field& field : kFields) {
    if (field.set == nullptr || !field.overlaps(offset, data.size())) continue;
    uint64_t value = field.get(*this);
    const uint64_t first = std::max<uint64_t>(offset, field.offset);
    const uint64_t end = std::min<uint64_t>(offset + data.size(), field.offset + field.size);
    std::memcpy(reinterpret_cast<std::byte*>(&value) + (first - field.offset),
                data.data() + (first - offset), end - first);
    field.set(*this, value);
  }
}

CommonConfig::Queue* CommonConfig::configurable() {
  Queue* queue = selected();
  return queue != nullptr && !queue->enabled ? queue : nullptr;
}

uint32_t CommonConfig::offered_word() const {
  if (device_feature_select_ > 1) return 0;
  return static_cast<uint32_t>(offered_features_ >> (32 * device_feature_select_));
}

uint32_t CommonConfig::driver_word() const {
  if (driver_feature_select_ > 1) return 0;
  return static_cast<uint32_t>(driver_features_ >> (32 * driver_feature_select_));
}

void CommonConfig::set_driver_word(uint32_t word) {
  if ((status_ & kStatusFeaturesOk) != 0) return;
  if (driver_feature_select_ > 1) {
    took_unknown_features_ |= word != 0;
    return;
  }
  const unsigned shift = 32 * driver_feature_select_;
  driver_features_ &= ~(uint64_t{0xffffffff} << shift);
  driver_features_ |= uint64_t{word} << shift;
}

void CommonConfig::set_status(uint8_t value) {
  if (value == 0) {
    reset();
    owner_->on_driver_reset();
    return;
  }
  // 2.1.1: a driver only adds bits.
  uint8_t added = value & static_cast<uint8_t>(~status_ & ~kStatusNeedsReset);
  const bool acceptable = !took_unknown_features_ && (driver_features_ & ~offered_features_) == 0 &&
                          (driver_features_ & kFeatureVersion1) != 0;
  if (!acceptable) added &= static_cast<uint8_t>(~kStatusFeaturesOk);
  if (((status_ | added) & kStatusFeaturesOk) == 0) added &= static_cast<uint8_t>(~kStatusDriverOk);
  status_ |= added;
  if ((added & kStatusFeaturesOk) != 0) owner_->on_features_accepted(driver_features_);
  if ((added & kStatusDriverOk) != 0) owner_->on_driver_ok();
}

void CommonConfig::set_queue_size(uint16_t size) {
  Queue* queue = configurable();
  if (queue != nullptr && std::has_single_bit(size) && size <= queue->max_size) queue->size = size;
}

}  // namespace mvgpu::glue
