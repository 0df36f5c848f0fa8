#pragma once

#include <cstdint>

#include "gpu-model/display/display.h"

namespace mvgpu::gpu {

// A fingerprint of what can be seen, equal for equal pictures on every machine: XXH3 64-bit, seed
// 0, over
//   width, height   32-bit little-endian each
//   pixels          line by line without padding: B, G, R, 0 (the fourth byte is not shown)
// 0 for a scanout that is off. Target: 2 GB/s of pixels at least in a release build.
uint64_t FrameHash(const FrameView& frame);

}  // namespace mvgpu::gpu
