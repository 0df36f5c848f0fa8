#include "gpu-model/pixel_format.h"

#include <cstring>

#include "apionly-domain/base/check.h"

namespace mvgpu::gpu {

namespace {

// Applies `convert` to every pixel as a little-endian word: byte 0 is the lowest one.
template <typename Convert>
void ForEachPixel(std::span<const std::byte> source, std::span<std::byte> destination,
                  Convert convert) {
  const std::byte* from = source.data();
  std::byte* to = destination.data();
  for (size_t i = 0; i + kBytesPerPixel <= source.size(); i += kBytesPerPixel) {
    uint32_t pixel;
    std::memcpy(&pixel, from + i, sizeof(pixel));
    pixel = convert(pixel);
    std::memcpy(to + i, &pixel, sizeof(pixel));
  }
}

}  // namespace

std::optional<wire::Format> FormatFromWire(uint32_t value) {
  const auto format = static_cast<wire::Format>(value);
  switch (format) {
    case wire::Format::kB8G8R8A8:
    case wire::Format::kB8G8R8X8:
    case wire::Format::kA8R8G8B8:
    case wire::Format::kX8R8G8B8:
    case wire::Format::kR8G8B8A8:
    case wire::Format::kX8B8G8R8:
    case wire::Format::kA8B8G8R8:
    case wire::Format::kR8G8B8X8:
      return format;
  }
  return std::nullopt;
}

bool IsShownAsIs(wire::Format format) {
  return format == wire::Format::kB8G8R8A8 || format == wire::Format::kB8G8R8X8;
}

void ConvertLine(wire::Format format, std::span<const std::byte> source,
                 std::span<std::byte> destination) {
  MVGPU_DCHECK(source.size() == destination.size());
  switch (format) {
    case wire::Format::kB8G8R8A8:
    case wire::Format::kB8G8R8X8:
      return ForEachPixel(source, destination, [](uint32_t p) { return p & 0x00ffffff; });
    case wire::Format::kA8R8G8B8:
    case wire::Format::kX8R8G8B8:
      return ForEachPixel(source, destination,
                          [](uint32_t p) { return __builtin_bswap32(p) & 0x00ffffff; });
    case wire::Format::kR8G8B8A8:
    case wire::Format::kR8G8B8X8:
      return ForEachPixel(source, destination, [](uint32_t p) {
        return ((p & 0xff) << 16) | (p & 0xff00) | ((p >> 16) & 0xff);
      });
    case wire::Format::kA8B8G8R8:
    case wire::Format::kX8B8G8R8:
      return ForEachPixel(source, destination, [](uint32_t p) { return p >> 8; });
  }
}

}  // namespace mvgpu::gpu
