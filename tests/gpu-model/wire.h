#pragma once

// The tests' own copy of the wire format (virtio 1.2, 5.7.6): a mistake in the device's copy shows.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <span>
#include <vector>

namespace mvgpu::gpu::testing {

enum : uint32_t {
  kCmdGetDisplayInfo = 0x100,
  kCmdCreate2d = 0x101,
  kCmdUnref = 0x102,
  kCmdSetScanout = 0x103,
  kCmdFlush = 0x104,
  kCmdTransfer = 0x105,
  kCmdAttach = 0x106,
  kCmdDetach = 0x107,
  kCmdGetCapsetInfo = 0x108,
  kCmdGetEdid = 0x10a,
  kCmdCreateBlob = 0x10c,
  kCmdUpdateCursor = 0x300,
  kCmdMoveCursor = 0x301,
  kOk = 0x1100,
  kOkDisplayInfo = 0x1101,
  kOkEdid = 0x1104,
  kErrUnspec = 0x1200,
  kErrOutOfMemory = 0x1201,
  kErrScanoutId = 0x1202,
  kErrResourceId = 0x1203,
  kErrParameter = 0x1205,
  kFormatB8G8R8A8 = 1,
  kFormatB8G8R8X8 = 2,
  kFormatA8R8G8B8 = 3,
  kFormatX8R8G8B8 = 4,
  kFormatR8G8B8A8 = 67,
  kFormatX8B8G8R8 = 68,
  kFormatA8B8G8R8 = 121,
  kFormatR8G8B8X8 = 134,
};

struct WireHeader {
  uint32_t type = 0;
  uint32_t flags = 0;
  uint64_t fence_id = 0;
  uint32_t ctx_id = 0;
  uint8_t ring_idx = 0;
  uint8_t padding[3] = {};
};
struct WireRect {
  uint32_t x = 0, y = 0, width = 0, height = 0;
};
struct WireEntry {
  uint64_t address = 0;
  uint32_t length = 0;
  uint32_t padding = 0;
};

// A request, field by field.
class RequestBytes {
 public:
  explicit RequestBytes(uint32_t type) { add(WireHeader{.type = type}); }
  explicit RequestBytes(const WireHeader& header) { add(header); }

  template <typename T>
  RequestBytes& add(const T& value) {
    const size_t at = bytes_.size();
    bytes_.resize(at + sizeof(value));
    std::memcpy(bytes_.data() + at, &value, sizeof(value));
    return *this;
  }
  RequestBytes& u32(std::initializer_list<uint32_t> values) {
    for (const uint32_t value : values) add(value);
    return *this;
  }
  RequestBytes& cut(size_t bytes) {
    bytes_.resize(bytes_.size() - bytes);
    return *this;
  }
  std::span<const std::byte> bytes() const { return bytes_; }

 private:
  std::vector<std::byte> bytes_;
};

}  // namespace mvgpu::gpu::testing
