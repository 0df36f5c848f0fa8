#pragma once

// A gpu::GpuDevice as a virtio device: two queues and a configuration of 16 bytes
// (virtio 1.2, 5.7). Not thread-safe.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "apionly-domain/base/error.h"
#include "gpu-model/gpu_device.h"
#include "vmm-glue/virtio/virtio_device.h"

namespace mvgpu::glue {

class VirtioGpu final : public VirtioDevice, private gpu::GpuDevice::Owner {
 public:
  static constexpr uint16_t kControlQueue = 0;
  static constexpr uint16_t kCursorQueue = 1;

  // Told when the configuration changed by itself. Outlives the adapter.
  class Owner {
   public:
    virtual ~Owner() = default;
    virtual void on_config_change() = 0;
  };
  // Makes the GPU, e.g. by gpu::GpuDevice::Create(), with the owner it is given.
  using MakeGpu = std::function<Result<std::unique_ptr<gpu::GpuDevice>>(gpu::GpuDevice::Owner*)>;

  // Errors: those of `make_gpu`.
  static Result<std::unique_ptr<VirtioGpu>> Create(const MakeGpu& make_gpu, Owner* owner);

  gpu::GpuDevice& gpu() { return *gpu_; }
  const gpu::GpuDevice& gpu() const { return *gpu_; }

  uint16_t device_id() const override { return 16; }
  uint64_t features() const override { return gpu_->features(); }
  void set_driver_features(uint64_t features) override { gpu_->set_driver_features(features); }
  uint16_t queue_count() const override { return 2; }
  uint16_t queue_size(uint16_t queue) const override;
  uint32_t config_size() const override { return 16; }
  void read_config(uint32_t offset, std::span<std::byte> data) const override;
  void write_config(uint32_t offset, std::span<const std::byte> data) override;
  Result<uint32_t> handle(uint16_t queue, std::span<const std::byte> request,
                          std::span<std::byte> response) override;
  void reset() override { gpu_->reset(); }

 private:
  explicit VirtioGpu(Owner* owner) : owner_(owner) {}
  void on_display_event() override { owner_->on_config_change(); }

  Owner* const owner_;                   // outlives this, see above
  std::unique_ptr<gpu::GpuDevice> gpu_;  // set once by Create()
};

}  // namespace mvgpu::glue
