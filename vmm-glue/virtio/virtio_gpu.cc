#include "vmm-glue/virtio/virtio_gpu.h"

#include "apionly-domain/base/check.h"

namespace mvgpu::glue {

namespace {

// As QEMU has them, the control queue as in its 3D device: Linux waits for room in a smaller one
// when it attaches large framebuffers.
constexpr uint16_t kControlQueueSize = 256;
constexpr uint16_t kCursorQueueSize = 16;

}  // namespace

Result<std::unique_ptr<VirtioGpu>> VirtioGpu::Create(const MakeGpu& make_gpu, Owner* owner) {
  std::unique_ptr<VirtioGpu> adapter(new VirtioGpu(owner));
  MVGPU_ASSIGN_OR_RETURN(adapter->gpu_, make_gpu(adapter.get()));
  return adapter;
}

uint16_t VirtioGpu::queue_size(uint16_t queue) const {
  return queue == kControlQueue ? kControlQueueSize : kCursorQueueSize;
}

void VirtioGpu::read_config(uint32_t offset, std::span<std::byte> data) const {
  gpu_->read_config(offset, data);
}

void VirtioGpu::write_config(uint32_t offset, std::span<const std::byte> data) {
  gpu_->write_config(offset, data);
}

Result<uint32_t> VirtioGpu::handle(uint16_t queue, std::span<const std::byte> request,
                                   std::span<std::byte> response) {
  if (queue == kControlQueue) return gpu_->execute_control(request, response);
  MVGPU_CHECK(queue == kCursorQueue);
  gpu_->execute_cursor(request);
  return 0;
}

}  // namespace mvgpu::glue
