#pragma once

// The PCI virtio-gpu that a VMM attaches: a GPU, its virtio adapter and the transport, put
// together. vfio_device() is what a vfio-user server serves; the device's thread calls
// process_one().
//
// Not thread-safe: every call is made under one lock of the caller (see virtio_pci.h).

#include <cstdint>
#include <memory>

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/container.h"
#include "gpu-model/gpu_device.h"
#include "vmm-glue/vfio_device.h"
#include "vmm-glue/virtio/virtio_gpu.h"
#include "vmm-glue/virtio/virtio_pci.h"

namespace mvgpu::glue {

class VirtioGpuPci final : private VirtioGpu::Owner {
 public:
  // The domain, the container it is attached to and the owner outlive the device. Errors: those of
  // `make_gpu`.
  static Result<std::unique_ptr<VirtioGpuPci>> Create(const VirtioGpu::MakeGpu& make_gpu,
                                                      domain::ApiOnlyDomain* domain,
                                                      domain::Container* container,
                                                      VirtioPciDevice::Owner* owner);

  VfioDevice& vfio_device() { return *transport_; }
  gpu::GpuDevice& gpu() { return adapter_->gpu(); }

  // These for VirtioGpu::kControlQueue and kCursorQueue; see VirtioPciDevice.
  VirtioPciDevice::Processed process_one(uint16_t queue) { return transport_->process_one(queue); }
  void deliver_interrupts() { transport_->deliver_interrupts(); }
  void wait_for_memory(uint16_t queue, const Error& why) {
    transport_->wait_for_memory(queue, why);
  }
  void stop_queue(uint16_t queue, const Error& why) { transport_->stop_queue(queue, why); }
  bool has_work() const { return transport_->has_work(); }

 private:
  VirtioGpuPci() = default;
  void on_config_change() override;

  // In the order of their making; each uses those above.
  std::unique_ptr<VirtioGpu> adapter_;
  std::unique_ptr<VirtioPciDevice> transport_;
};

}  // namespace mvgpu::glue
