#pragma once

// A 2D resource: a picture in host memory, in the guest's pixel format, and the guest pages that it
// is filled from. Guest bytes go straight from the pages into the picture; conversion waits until
// somebody looks (scanout.h).
//
// Where to read next: backing.h (the guest's pages), pixel_buffer.h (the budget).

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>

#include "apionly-domain/base/error.h"
#include "gpu-model/backing.h"
#include "gpu-model/display/display.h"
#include "gpu-model/pixel_buffer.h"
#include "gpu-model/pixel_format.h"
#include "gpu-model/protocol.h"

namespace mvgpu::gpu {

// Not thread-safe.
class Resource {
 public:
  static constexpr uint32_t kMaxDimension = 16384;

  // REQUIRES: 1 <= width, height <= kMaxDimension. Errors: kLimit.
  static Result<std::unique_ptr<Resource>> Create(wire::Format format, Size size,
                                                  PixelBudget* budget);

  wire::Format format() const { return format_; }
  Size size() const { return size_; }
  uint32_t stride() const { return size_.width * kBytesPerPixel; }
  // One line longer than the picture, so that a rectangle's lines can be seen with the picture's
  // stride.
  std::span<const std::byte> pixels() const { return pixels_.bytes(); }

  bool has_backing() const { return backing_.has_value(); }
  uint64_t backing_entries() const { return backing_ ? backing_->entries() : 0; }
  // REQUIRES: !has_backing().
  void attach(Backing backing);
  void detach() { backing_.reset(); }
  // The translations of these addresses are void, see Backing.
  void forget(IovaRange range) {
    if (backing_) backing_->forget(range);
  }

  // TRANSFER_TO_HOST_2D: fills the rectangle from the backing, whose lines start at `offset` and
  // are stride() apart. Returns the bytes copied. Errors: Backing::copy(). REQUIRES: has_backing(),
  // the rectangle lies inside the picture.
  Result<uint64_t> transfer(const Rect& rect, uint64_t offset);

 private:
  Resource(wire::Format format, Size size, PixelBuffer pixels);

  const wire::Format format_;
  const Size size_;
  PixelBuffer pixels_;
  std::optional<Backing> backing_;
};

}  // namespace mvgpu::gpu
