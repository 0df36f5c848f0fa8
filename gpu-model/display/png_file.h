#pragma once

#include <string>

#include "apionly-domain/base/error.h"
#include "gpu-model/display/display.h"

namespace mvgpu::gpu {

// Writes the picture as PNG, 8 bits each of red, green and blue. The file appears complete or not
// at all: it is written beside its place and renamed. Errors: kInvalid (no picture), kSystem,
// kLimit; all name the path.
Result<void> WritePng(const FrameView& frame, const std::string& path);

}  // namespace mvgpu::gpu
