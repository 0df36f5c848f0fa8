#pragma once

#include <array>
#include <cstddef>
#include <string>

#include "apionly-domain/base/error.h"
#include "gpu-model/display/display.h"

namespace mvgpu::gpu {

// What a monitor would say about itself: VESA E-EDID 1.4 base block and one CTA-861 extension
// block.
inline constexpr size_t kEdidSize = 256;
using EdidBlob = std::array<std::byte, kEdidSize>;

struct EdidInfo {
  Size preferred;    // the first detailed timing, at 60 Hz
  Size largest;      // well-known modes beyond it are left out
  std::string name;  // at most 13 ASCII characters, longer ones are cut; so the next
  std::string serial;
};

// kInvalid, with the limits, for a mode that a detailed timing cannot describe or beyond `largest`.
Result<void> CheckPreferredMode(Size preferred, Size largest);

// Timings of the preferred mode: VESA CVT with reduced blanking (libxcvt). Others: DMT and CVT
// modes up to 3840x2160; 4096 is one pixel more than a detailed timing can say. REQUIRES:
// CheckPreferredMode(info.preferred, info.largest).
EdidBlob MakeEdid(const EdidInfo& info);

}  // namespace mvgpu::gpu
