#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <span>

#include "apionly-domain/base/error.h"

namespace mvgpu::gpu {

// How much host memory the guest may make the device hold. Not thread-safe.
class PixelBudget {
 public:
  explicit PixelBudget(uint64_t limit) : limit_(limit) {}
  PixelBudget(const PixelBudget&) = delete;
  PixelBudget& operator=(const PixelBudget&) = delete;

  uint64_t limit() const { return limit_; }
  uint64_t used() const { return used_; }

 private:
  friend class PixelBuffer;
  const uint64_t limit_;
  uint64_t used_ = 0;
};

// Zeroed host memory for pixels, charged to a budget while it lives. Move-only.
class PixelBuffer {
 public:
  PixelBuffer() = default;
  // `budget` outlives the buffer. Errors: kLimit (budget, or no memory); nothing is charged then.
  static Result<PixelBuffer> Create(uint64_t bytes, PixelBudget* budget);
  PixelBuffer(PixelBuffer&& other) noexcept;
  PixelBuffer& operator=(PixelBuffer&& other) noexcept;
  PixelBuffer(const PixelBuffer&) = delete;
  PixelBuffer& operator=(const PixelBuffer&) = delete;
  ~PixelBuffer() { reset(); }

  std::span<std::byte> bytes() { return {data_.get(), size_}; }
  std::span<const std::byte> bytes() const { return {data_.get(), size_}; }
  void reset();

 private:
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  using Data = std::unique_ptr<std::byte[], Free>;
  PixelBuffer(Data data, size_t size, PixelBudget* budget);

  Data data_;
  size_t size_ = 0;
  PixelBudget* budget_ = nullptr;  // outlives this: contract of Create()
};

}  // namespace mvgpu::gpu
