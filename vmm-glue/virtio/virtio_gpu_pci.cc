#include "vmm-glue/virtio/virtio_gpu_pci.h"

namespace mvgpu::glue {

namespace {

constexpr uint32_t kClassDisplayOther = 0x038000;  // not VGA compatible; as QEMU's virtio-gpu-pci

}  // namespace

Result<std::unique_ptr<VirtioGpuPci>> VirtioGpuPci::Create(const VirtioGpu::MakeGpu& make_gpu,
                                                           domain::ApiOnlyDomain* domain,
                                                           domain::Container* container,
                                                           VirtioPciDevice::Owner* owner) {
  std::unique_ptr<VirtioGpuPci> device(new VirtioGpuPci);
  MVGPU_ASSIGN_OR_RETURN(device->adapter_, VirtioGpu::Create(make_gpu, device.get()));
  MVGPU_ASSIGN_OR_RETURN(device->transport_,
                         VirtioPciDevice::Create({.class_code = kClassDisplayOther},
                                                 device->adapter_.get(), domain, container, owner));
  return device;
}

// The GPU may speak up while it is being made.
void VirtioGpuPci::on_config_change() {
  if (transport_ != nullptr) transport_->notify_config_change();
}

}  // namespace mvgpu::glue
