#pragma once

#include <cstdint>
#include <optional>

#include "apionly-domain/base/error.h"
#include "gpu-model/display/display.h"
#include "gpu-model/pixel_buffer.h"
#include "gpu-model/resource.h"

namespace mvgpu::gpu {

// The part of `rect` inside `window`, counted from the window's corner; nullopt when there is none.
std::optional<Rect> DamageInWindow(const Rect& rect, const Rect& window);

// One head: the rectangle of a resource that it shows. Pictures in B, G, R, X order are shown where
// they lie; others are converted, the damaged part at each flush, into a buffer of the scanout's
// own.
//
// Not thread-safe.
class Scanout {
 public:
  bool is_on() const { return resource_ != nullptr; }
  bool shows(const Resource& resource) const { return resource_ == &resource; }
  const Rect& window() const { return window_; }

  // Shows a rectangle of the resource from now on; false when it does so already. Errors: kLimit
  // (budget for the conversion buffer); the old picture stays then. REQUIRES: the rectangle lies
  // inside the picture and is not empty.
  Result<bool> bind(const Resource& resource, const Rect& window, PixelBudget* budget);
  void disable();

  // RESOURCE_FLUSH of the resource that is shown: what changed here; nullopt: nothing.
  std::optional<Rect> flush(const Rect& rect);

  // REQUIRES: is_on().
  FrameView frame() const;

 private:
  void convert(const Rect& damage);

  const Resource* resource_ = nullptr;  // the device disables the scanout before the resource goes
  Rect window_;
  PixelBuffer converted_;  // empty: the resource's own pixels are shown
};

}  // namespace mvgpu::gpu
