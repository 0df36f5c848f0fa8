#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "vmm-glue/virtio/virtio_device.h"

namespace mvgpu::testing {

// Remembers what the transport asked of it and answers with what the test says; by default it
// echoes.
class FakeVirtioDevice final : public glue::VirtioDevice {
 public:
  struct Handled {
    uint16_t queue = 0;
    std::vector<std::byte> request;
    size_t response_space = 0;
  };
  static constexpr uint64_t kFeature = 1u << 1;

  uint16_t device_id() const override { return 16; }
  uint64_t features() const override { return kFeature; }
  void set_driver_features(uint64_t features) override { driver_features = features; }
  uint16_t queue_count() const override { return static_cast<uint16_t>(queue_sizes.size()); }
  uint16_t queue_size(uint16_t queue) const override { return queue_sizes[queue]; }

  uint32_t config_size() const override { return static_cast<uint32_t>(config.size()); }
  void read_config(uint32_t offset, std::span<std::byte> data) const override {
    std::copy_n(config.begin() + offset, data.size(), data.begin());
  }
  void write_config(uint32_t offset, std::span<const std::byte> data) override {
    std::copy(data.begin(), data.end(), config.begin() + offset);
  }
  Result<uint32_t> handle(uint16_t queue, std::span<const std::byte> request,
                          std::span<std::byte> response) override {
    handled.push_back({queue, {request.begin(), request.end()}, response.size()});
    if (on_handle) return on_handle(queue, request, response);
    const size_t count = std::min(request.size(), response.size());
    std::copy_n(request.begin(), count, response.begin());
    return static_cast<uint32_t>(count);
  }
  void reset() override { ++resets; }

  std::vector<uint16_t> queue_sizes{64, 16};
  std::vector<std::byte> config = std::vector<std::byte>(16);
  uint64_t driver_features = 0;
  std::vector<Handled> handled;
  int resets = 0;
  std::function<Result<uint32_t>(uint16_t, std::span<const std::byte>, std::span<std::byte>)>
      on_handle;
};

}  // namespace mvgpu::testing
