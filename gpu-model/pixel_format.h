#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "gpu-model/protocol.h"

namespace mvgpu::gpu {

// All formats of virtio 1.2 have four bytes per pixel.
inline constexpr uint32_t kBytesPerPixel = 4;

// nullopt for a number that is no format of virtio 1.2, 5.7.6.8.
std::optional<wire::Format> FormatFromWire(uint32_t value);

// True when the format's bytes are B, G, R, and something: what a FrameView shows without
// conversion.
bool IsShownAsIs(wire::Format format);

// Converts one line of pixels to B, G, R, 0 in memory order; alpha is dropped, as QEMU's screen
// does. REQUIRES: both have the same size, a multiple of kBytesPerPixel, and do not overlap.
void ConvertLine(wire::Format format, std::span<const std::byte> source,
                 std::span<std::byte> destination);

}  // namespace mvgpu::gpu
