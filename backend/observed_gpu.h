#pragma once

#include <memory>

#include "backend/session_observer.h"
#include "gpu-model/gpu_device.h"

namespace mvgpu::backend {

// A GPU whose requests and responses an observer sees. The observer outlives it.
std::unique_ptr<gpu::GpuDevice> ObserveGpu(std::unique_ptr<gpu::GpuDevice> inner,
                                           SessionObserver* observer);

}  // namespace mvgpu::backend
