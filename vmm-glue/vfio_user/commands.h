#pragma once

// What each command of an established connection does with the device. A handler checks the
// payload, which is the client's, acts, and appends the payload of its reply (nothing for commands
// whose reply is a header only: Cloud Hypervisor reads exactly 16 bytes then). An error becomes a
// header-only error reply.

#include "apionly-domain/base/error.h"
#include "vmm-glue/vfio_device.h"
#include "vmm-glue/vfio_user/message.h"

namespace mvgpu::glue::vfio_user {

// info_commands.cc
Result<void> GetDeviceInfo(VfioDevice& device, Message& message, Payload& reply);
Result<void> GetRegionInfo(VfioDevice& device, Message& message, Payload& reply);
Result<void> GetRegionIoFds(VfioDevice& device, Message& message, Payload& reply);
Result<void> GetIrqInfo(VfioDevice& device, Message& message, Payload& reply);

// dma_commands.cc
Result<void> MapDma(VfioDevice& device, Message& message, Payload& reply);
Result<void> UnmapDma(VfioDevice& device, Message& message, Payload& reply);

// irq_commands.cc
Result<void> SetDeviceIrqs(VfioDevice& device, Message& message, Payload& reply);

// region_commands.cc
Result<void> ReadRegion(VfioDevice& device, Message& message, Payload& reply);
Result<void> WriteRegion(VfioDevice& device, Message& message, Payload& reply);
Result<void> WriteRegionMulti(VfioDevice& device, Message& message, Payload& reply);

}  // namespace mvgpu::glue::vfio_user
