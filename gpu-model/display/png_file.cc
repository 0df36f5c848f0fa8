#include "gpu-model/display/png_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <png.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "apionly-domain/base/unique_fd.h"

namespace mvgpu::gpu {

namespace {

std::vector<uint8_t> PackBgr(const FrameView& frame) {
  std::vector<uint8_t> packed(size_t{frame.size.width} * frame.size.height * 3);
  uint8_t* to = packed.data();
  for (uint32_t y = 0; y < frame.size.height; ++y) {
    const std::byte* from = frame.pixels.data() + size_t{y} * frame.stride;
    for (uint32_t x = 0; x < frame.size.width; ++x, from += 4, to += 3) {
      for (size_t i = 0; i < 3; ++i) to[i] = static_cast<uint8_t>(from[i]);
    }
  }
  return packed;
}

// libpng's simplified interface: it catches its own errors and never jumps out of a call.
Result<std::vector<uint8_t>> EncodePng(const FrameView& frame, const std::string& path) {
  png_image image{};
  image.version = PNG_IMAGE_VERSION;
  image.width = frame.size.width;
  image.height = frame.size.height;
  image.format = PNG_FORMAT_BGR;
  const std::vector<uint8_t> packed = PackBgr(frame);
  std::vector<uint8_t> encoded(PNG_IMAGE_PNG_SIZE_MAX(image));
  png_alloc_size_t size = encoded.size();
  if (png_image_write_to_memory(&image, encoded.data(), &size, /*convert_to_8_bit=*/0,
                                packed.data(),
                                /*row_stride=*/0, /*colormap=*/nullptr) == 0) {
    const std::string reason = image.message;
    png_image_free(&image);
    return Fail(ErrorCode::kLimit, fmt::format("{}: a picture of {}x{} cannot be encoded: {}", path,
                                               image.width, image.height, reason));
  }
  encoded.resize(size);
  return encoded;
}

Result<void> WriteAll(int fd, std::span<const uint8_t> bytes, const std::string& path) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(fd, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) {
      return FailSystem(errno, fmt::format("cannot write the screenshot {}; free space or choose "
                                           "another path",
                                           path));
    }
    bytes = bytes.subspan(static_cast<size_t>(written));
  }
  return {};
}

Result<void> WriteAndRename(std::span<const uint8_t> bytes, const std::string& temporary,
                            const std::string& path) {
  ::unlink(temporary.c_str());  // left by a crash of a process with the same number
  UniqueFd fd(::open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644));
  if (!fd.is_valid()) {
    return FailSystem(errno,
                      fmt::format("cannot create the screenshot {}; choose a path in a folder "
                                  "that is there and may be written",
                                  temporary));
  }
  MVGPU_RETURN_IF_ERROR(WriteAll(fd.get(), bytes, path));
  if (::rename(temporary.c_str(), path.c_str()) != 0) {
    return FailSystem(errno,
                      fmt::format("cannot put the screenshot to {}; choose another path", path));
  }
  return {};
}

}  // namespace

Result<void> WritePng(const FrameView& frame, const std::string& path) {
  if (frame.pixels.empty() || frame.size.width == 0 || frame.size.height == 0) {
    return Fail(
        ErrorCode::kInvalid,
        fmt::format("{}: there is no picture to write; wait until the guest shows one", path));
  }
  MVGPU_ASSIGN_OR_RETURN(const std::vector<uint8_t> encoded, EncodePng(frame, path));
  const std::string temporary = fmt::format("{}.{}.tmp", path, ::getpid());
  auto written = WriteAndRename(encoded, temporary, path);
  if (!written) ::unlink(temporary.c_str());
  return written;
}

}  // namespace mvgpu::gpu
