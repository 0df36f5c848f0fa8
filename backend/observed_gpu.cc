#include "backend/observed_gpu.h"

#include <utility>

#include "vmm-glue/virtio/virtio_gpu.h"

namespace mvgpu::backend {

namespace {

class ObservedGpu final : public gpu::GpuDevice {
 public:
  ObservedGpu(std::unique_ptr<gpu::GpuDevice> inner, SessionObserver* observer)
      : inner_(std::move(inner)), observer_(observer) {}

  uint64_t features() const override { return inner_->features(); }
  void set_driver_features(uint64_t features) override { inner_->set_driver_features(features); }
  void read_config(uint32_t offset, std::span<std::byte> data) const override {
    inner_->read_config(offset, data);
  }
  void write_config(uint32_t offset, std::span<const std::byte> data) override {
    inner_->write_config(offset, data);
  }
  Result<uint32_t> execute_control(std::span<const std::byte> request,
                                   std::span<std::byte> response) override {
    observer_->on_request(glue::VirtioGpu::kControlQueue, request);
    const auto written = inner_->execute_control(request, response);
    if (written) observer_->on_response(glue::VirtioGpu::kControlQueue, response.first(*written));
    return written;
  }
  void execute_cursor(std::span<const std::byte> request) override {
    observer_->on_request(glue::VirtioGpu::kCursorQueue, request);
    inner_->execute_cursor(request);
  }
  void reset() override { inner_->reset(); }
  std::optional<gpu::FrameView> frame(uint32_t scanout) const override {
    return inner_->frame(scanout);
  }
  gpu::CursorState cursor(uint32_t scanout) const override { return inner_->cursor(scanout); }
  Result<void> set_preferred_mode(uint32_t scanout, gpu::Size mode) override {
    return inner_->set_preferred_mode(scanout, mode);
  }
  Counters counters() const override { return inner_->counters(); }

 private:
  const std::unique_ptr<gpu::GpuDevice> inner_;
  SessionObserver* const observer_;  // outlives this, see ObserveGpu()
};

}  // namespace

std::unique_ptr<gpu::GpuDevice> ObserveGpu(std::unique_ptr<gpu::GpuDevice> inner,
                                           SessionObserver* observer) {
  return std::make_unique<ObservedGpu>(std::move(inner), observer);
}

}  // namespace mvgpu::backend
