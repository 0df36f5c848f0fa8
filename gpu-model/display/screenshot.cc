#include "gpu-model/display/screenshot.h"

#include <fmt/format.h>

#include <cstring>

#include "gpu-model/display/frame_hash.h"
#include "gpu-model/display/png_file.h"

namespace mvgpu::gpu {

namespace {

constexpr size_t kBytesPerPixel = 4;

}  // namespace

void Screenshot::on_frame(uint32_t scanout, const FrameView& frame, const Rect& damage) {
  MutexLock lock(mutex_);
  Picture& picture = pictures_[scanout];
  Rect part = damage;
  if (picture.size != frame.size) {
    picture.size = frame.size;
    picture.pixels.resize(size_t{frame.size.width} * frame.size.height * kBytesPerPixel);
    part = {0, 0, frame.size.width, frame.size.height};
  }
  const size_t stride = size_t{frame.size.width} * kBytesPerPixel;
  const size_t left = size_t{part.x} * kBytesPerPixel;
  for (uint32_t y = part.y; y < part.y + part.height; ++y) {
    std::memcpy(picture.pixels.data() + y * stride + left,
                frame.pixels.data() + size_t{y} * frame.stride + left,
                size_t{part.width} * kBytesPerPixel);
  }
}

std::optional<uint64_t> Screenshot::hash(uint32_t scanout) const {
  ReaderMutexLock lock(mutex_);
  const auto it = pictures_.find(scanout);
  if (it == pictures_.end()) return std::nullopt;
  return FrameHash(it->second.view());
}

std::optional<uint32_t> Screenshot::pixel(uint32_t scanout, uint32_t x, uint32_t y) const {
  ReaderMutexLock lock(mutex_);
  const auto it = pictures_.find(scanout);
  if (it == pictures_.end()) return std::nullopt;
  const Picture& picture = it->second;
  if (x >= picture.size.width || y >= picture.size.height) return std::nullopt;
  const size_t index = size_t{y} * picture.size.width + x;
  uint32_t pixel = 0;
  std::memcpy(&pixel, picture.pixels.data() + index * kBytesPerPixel, sizeof(pixel));
  return pixel;
}

Result<void> Screenshot::save_png(const std::string& path, uint32_t scanout) const {
  Picture picture;
  {
    ReaderMutexLock lock(mutex_);
    if (const auto it = pictures_.find(scanout); it != pictures_.end()) picture = it->second;
  }
  if (picture.pixels.empty()) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("{}: scanout {} shows nothing; wait until the guest has set a mode",
                            path, scanout));
  }
  return WritePng(picture.view(), path);
}

}  // namespace mvgpu::gpu
