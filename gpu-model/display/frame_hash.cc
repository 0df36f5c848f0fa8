#include "gpu-model/display/frame_hash.h"

#include <xxhash.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstring>
#include <memory>

#include "apionly-domain/base/check.h"

namespace mvgpu::gpu {

namespace {

constexpr size_t kBytesPerPixel = 4;
constexpr size_t kChunkPixels = 2048;  // small enough for the first-level cache

static_assert(std::endian::native == std::endian::little);

struct FreeState {
  void operator()(XXH3_state_t* state) const { XXH3_freeState(state); }
};

}  // namespace

uint64_t FrameHash(const FrameView& frame) {
  if (frame.pixels.empty()) return 0;
  const std::unique_ptr<XXH3_state_t, FreeState> state(XXH3_createState());
  MVGPU_CHECK(state != nullptr);  // null only without memory
  XXH3_64bits_reset(state.get());
  const std::array<uint32_t, 2> size{frame.size.width, frame.size.height};
  XXH3_64bits_update(state.get(), size.data(), sizeof(size));

  std::array<uint32_t, kChunkPixels> chunk;
  for (uint32_t y = 0; y < frame.size.height; ++y) {
    const std::byte* line = frame.pixels.data() + size_t{y} * frame.stride;
    for (size_t x = 0; x < frame.size.width; x += kChunkPixels) {
      const size_t count = std::min<size_t>(kChunkPixels, frame.size.width - x);
      std::memcpy(chunk.data(), line + x * kBytesPerPixel, count * kBytesPerPixel);
      for (size_t i = 0; i < count; ++i) chunk[i] &= 0x00ffffff;
      XXH3_64bits_update(state.get(), chunk.data(), count * kBytesPerPixel);
    }
  }
  return XXH3_64bits_digest(state.get());
}

}  // namespace mvgpu::gpu
