#include "gpu-model/pixel_buffer.h"

#include <fmt/format.h>

#include <utility>

namespace mvgpu::gpu {

Result<PixelBuffer> PixelBuffer::Create(uint64_t bytes, PixelBudget* budget) {
  if (bytes > budget->limit_ - budget->used_) {
    return Fail(
        ErrorCode::kLimit,
        fmt::format("{} of {} bytes of host pixels are in use, {} more do not fit; choose a "
                    "vgpu type with a larger memory budget",
                    budget->used_, budget->limit_, bytes));
  }
  // calloc: large pictures that are never written cost no memory.
  Data data(static_cast<std::byte*>(std::calloc(bytes, 1)));
  if (data == nullptr && bytes != 0) {
    return Fail(ErrorCode::kLimit,
                fmt::format("the host has no memory for {} bytes of pixels; free some", bytes));
  }
  return PixelBuffer(std::move(data), bytes, budget);
}

PixelBuffer::PixelBuffer(Data data, size_t size, PixelBudget* budget)
    : data_(std::move(data)), size_(size), budget_(budget) {
  budget_->used_ += size_;
}

PixelBuffer::PixelBuffer(PixelBuffer&& other) noexcept
    : data_(std::move(other.data_)),
      size_(std::exchange(other.size_, 0)),
      budget_(std::exchange(other.budget_, nullptr)) {}

PixelBuffer& PixelBuffer::operator=(PixelBuffer&& other) noexcept {
  if (this != &other) {
    reset();
    data_ = std::move(other.data_);
    size_ = std::exchange(other.size_, 0);
    budget_ = std::exchange(other.budget_, nullptr);
  }
  return *this;
}

void PixelBuffer::reset() {
  if (budget_ != nullptr) budget_->used_ -= size_;
  data_.reset();
  size_ = 0;
  budget_ = nullptr;
}

}  // namespace mvgpu::gpu
