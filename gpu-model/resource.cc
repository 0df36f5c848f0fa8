#include "gpu-model/resource.h"

#include <utility>

#include "apionly-domain/base/check.h"

namespace mvgpu::gpu {

Result<std::unique_ptr<Resource>> Resource::Create(wire::Format format, Size size,
                                                   PixelBudget* budget) {
  MVGPU_CHECK(size.width != 0 && size.width <= kMaxDimension);
  MVGPU_CHECK(size.height != 0 && size.height <= kMaxDimension);
  const uint64_t bytes = uint64_t{size.width} * kBytesPerPixel * (size.height + 1);
  MVGPU_ASSIGN_OR_RETURN(PixelBuffer pixels, PixelBuffer::Create(bytes, budget));
  return std::unique_ptr<Resource>(new Resource(format, size, std::move(pixels)));
}

Resource::Resource(wire::Format format, Size size, PixelBuffer pixels)
    : format_(format), size_(size), pixels_(std::move(pixels)) {}

void Resource::attach(Backing backing) {
  MVGPU_CHECK(!backing_);
  backing_.emplace(std::move(backing));
}

Result<uint64_t> Resource::transfer(const Rect& rect, uint64_t offset) {
  MVGPU_CHECK(backing_);
  const uint64_t stride = this->stride();
  LineBlock block{offset, uint64_t{rect.width} * kBytesPerPixel, stride, rect.height};
  // Whole lines are one piece, in the backing as in the picture.
  if (rect.width == size_.width) {
    block = {offset, stride * rect.height, stride * rect.height, 1};
  }
  const uint64_t first = rect.y * stride + uint64_t{rect.x} * kBytesPerPixel;
  return backing_->copy(block, pixels_.bytes().subspan(first), stride);
}

}  // namespace mvgpu::gpu
