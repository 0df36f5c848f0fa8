#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace mvgpu::gpu {

struct Size {
  uint32_t width = 0;
  uint32_t height = 0;
  bool operator==(const Size&) const = default;
};

// Pixels; a rectangle that was checked to lie inside what it refers to.
struct Rect {
  uint32_t x = 0;
  uint32_t y = 0;
  uint32_t width = 0;
  uint32_t height = 0;
  bool operator==(const Rect&) const = default;
};

// What a scanout shows: 32-bit pixels, bytes in memory order B, G, R, X (DRM_FORMAT_XRGB8888).
// Valid during the call that hands it out only.
struct FrameView {
  Size size;
  uint32_t stride = 0;                // bytes per line
  std::span<const std::byte> pixels;  // stride * size.height bytes; empty: the scanout is off
};

// Where pictures go. Called on the thread that executes commands.
class Display {
 public:
  virtual ~Display() = default;
  // The guest flushed `damage` of what scanout `scanout` shows, or switched it to another picture.
  virtual void on_frame(uint32_t scanout, const FrameView& frame, const Rect& damage) = 0;
  // Nothing is shown any more.
  virtual void on_disabled(uint32_t scanout) = 0;
};

}  // namespace mvgpu::gpu
