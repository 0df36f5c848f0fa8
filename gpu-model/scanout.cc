#include "gpu-model/scanout.h"

#include <algorithm>
#include <utility>

#include "apionly-domain/base/check.h"
#include "gpu-model/pixel_format.h"

namespace mvgpu::gpu {

std::optional<Rect> DamageInWindow(const Rect& rect, const Rect& window) {
  const auto end = [](uint32_t start, uint32_t size) { return uint64_t{start} + size; };
  const uint64_t left = std::max(rect.x, window.x);
  const uint64_t top = std::max(rect.y, window.y);
  const uint64_t right = std::min(end(rect.x, rect.width), end(window.x, window.width));
  const uint64_t bottom = std::min(end(rect.y, rect.height), end(window.y, window.height));
  if (left >= right || top >= bottom) return std::nullopt;
  return Rect{static_cast<uint32_t>(left - window.x), static_cast<uint32_t>(top - window.y),
              static_cast<uint32_t>(right - left), static_cast<uint32_t>(bottom - top)};
}

Result<bool> Scanout::bind(const Resource& resource, const Rect& window, PixelBudget* budget) {
  if (resource_ == &resource && window_ == window) return false;
  if (IsShownAsIs(resource.format())) {
    converted_.reset();
  } else {
    const uint64_t bytes = uint64_t{window.width} * kBytesPerPixel * window.height;
    if (converted_.bytes().size() != bytes) {
      MVGPU_ASSIGN_OR_RETURN(converted_, PixelBuffer::Create(bytes, budget));
    }
  }
  resource_ = &resource;
  window_ = window;
  convert({0, 0, window.width, window.height});
  return true;
}

void Scanout::disable() {
  resource_ = nullptr;
  window_ = {};
  converted_.reset();
}

std::optional<Rect> Scanout::flush(const Rect& rect) {
  MVGPU_CHECK(is_on());
  const std::optional<Rect> damage = DamageInWindow(rect, window_);
  if (damage) convert(*damage);
  return damage;
}

void Scanout::convert(const Rect& damage) {
  if (IsShownAsIs(resource_->format())) return;
  const size_t line_bytes = size_t{damage.width} * kBytesPerPixel;
  for (uint32_t y = damage.y; y < damage.y + damage.height; ++y) {
    const size_t from =
        size_t{window_.y + y} * resource_->stride() + size_t{window_.x + damage.x} * kBytesPerPixel;
    const size_t to = (size_t{y} * window_.width + damage.x) * kBytesPerPixel;
    ConvertLine(resource_->format(), resource_->pixels().subspan(from, line_bytes),
                converted_.bytes().subspan(to, line_bytes));
  }
}

FrameView Scanout::frame() const {
  MVGPU_CHECK(is_on());
  FrameView view;
  view.size = {window_.width, window_.height};
  if (!IsShownAsIs(resource_->format())) {
    view.stride = window_.width * kBytesPerPixel;
    view.pixels = converted_.bytes();
    return view;
  }
  view.stride = resource_->stride();
  const size_t first = size_t{window_.y} * view.stride + size_t{window_.x} * kBytesPerPixel;
  view.pixels = resource_->pixels().subspan(first, size_t{view.stride} * window_.height);
  return view;
}

}  // namespace mvgpu::gpu
