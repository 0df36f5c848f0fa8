#pragma once

// The wire structures of virtio-gpu, 2D part (virtio 1.2, 5.7.6). Little-endian on the wire; this
// code runs on little-endian hosts only, so a field is what memcpy brings.

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <type_traits>

namespace mvgpu::gpu::wire {

static_assert(std::endian::native == std::endian::little);

inline constexpr uint32_t kMaxScanouts = 16;
inline constexpr uint64_t kFeatureEdid = uint64_t{1} << 1;  // 5.7.3
inline constexpr uint32_t kEventDisplay = 1;                // 5.7.4.1

// 5.7.6.7
inline constexpr uint32_t kFlagFence = 1u << 0;
inline constexpr uint32_t kFlagInfoRingIdx = 1u << 1;

enum class Command : uint32_t {
  kGetDisplayInfo = 0x0100,
  kResourceCreate2d = 0x0101,
  kResourceUnref = 0x0102,
  kSetScanout = 0x0103,
  kResourceFlush = 0x0104,
  kTransferToHost2d = 0x0105,
  kResourceAttachBacking = 0x0106,
  kResourceDetachBacking = 0x0107,
  kGetCapsetInfo = 0x0108,
  kGetCapset = 0x0109,
  kGetEdid = 0x010a,
  kResourceAssignUuid = 0x010b,
  kUpdateCursor = 0x0300,
  kMoveCursor = 0x0301,
};

enum class Response : uint32_t {
  kOkNodata = 0x1100,
  kOkDisplayInfo = 0x1101,
  kOkEdid = 0x1104,
  kErrUnspec = 0x1200,
  kErrOutOfMemory = 0x1201,
  kErrInvalidScanoutId = 0x1202,
  kErrInvalidResourceId = 0x1203,
  kErrInvalidContextId = 0x1204,
  kErrInvalidParameter = 0x1205,
};

// 5.7.6.8, RESOURCE_CREATE_2D. Names give the bytes in memory order.
enum class Format : uint32_t {
  kB8G8R8A8 = 1,
  kB8G8R8X8 = 2,
  kA8R8G8B8 = 3,
  kX8R8G8B8 = 4,
  kR8G8B8A8 = 67,
  kX8B8G8R8 = 68,
  kA8B8G8R8 = 121,
  kR8G8B8X8 = 134,
};

// 5.7.4
struct Config {
  uint32_t events_read;
  uint32_t events_clear;
  uint32_t num_scanouts;
  uint32_t num_capsets;
};
static_assert(sizeof(Config) == 16 && offsetof(Config, events_clear) == 4 &&
              offsetof(Config, num_scanouts) == 8);

struct Header {
  uint32_t type;
  uint32_t flags;
  uint64_t fence_id;
  uint32_t ctx_id;
  uint8_t ring_idx;
  uint8_t padding[3];
};
static_assert(sizeof(Header) == 24 && offsetof(Header, fence_id) == 8 &&
              offsetof(Header, ctx_id) == 16 && offsetof(Header, ring_idx) == 20);

struct Rectangle {
  uint32_t x;
  uint32_t y;
  uint32_t width;
  uint32_t height;
};
static_assert(sizeof(Rectangle) == 16 && offsetof(Rectangle, width) == 8);

struct DisplayOne {
  Rectangle rect;
  uint32_t enabled;
  uint32_t flags;
};
static_assert(sizeof(DisplayOne) == 24 && offsetof(DisplayOne, enabled) == 16);

// Behind the header of RESP_OK_DISPLAY_INFO.
struct DisplayInfo {
  DisplayOne modes[kMaxScanouts];
};
static_assert(sizeof(DisplayInfo) == 384);

struct GetEdid {
  Header header;
  uint32_t scanout;
  uint32_t padding;
};
static_assert(sizeof(GetEdid) == 32 && offsetof(GetEdid, scanout) == 24);

// Behind the header of RESP_OK_EDID.
struct Edid {
  uint32_t size;
  uint32_t padding;
  std::byte data[1024];
};
static_assert(sizeof(Edid) == 1032 && offsetof(Edid, data) == 8);

struct ResourceCreate2d {
  Header header;
  uint32_t resource_id;
  uint32_t format;
  uint32_t width;
  uint32_t height;
};
static_assert(sizeof(ResourceCreate2d) == 40 && offsetof(ResourceCreate2d, width) == 32);

// RESOURCE_UNREF and RESOURCE_DETACH_BACKING.
struct ResourceCommand {
  Header header;
  uint32_t resource_id;
  uint32_t padding;
};
static_assert(sizeof(ResourceCommand) == 32 && offsetof(ResourceCommand, resource_id) == 24);

struct SetScanout {
  Header header;
  Rectangle rect;
  uint32_t scanout_id;
  uint32_t resource_id;
};
static_assert(sizeof(SetScanout) == 48 && offsetof(SetScanout, scanout_id) == 40);

struct ResourceFlush {
  Header header;
  Rectangle rect;
  uint32_t resource_id;
  uint32_t padding;
};
static_assert(sizeof(ResourceFlush) == 48 && offsetof(ResourceFlush, resource_id) == 40);

struct TransferToHost2d {
  Header header;
  Rectangle rect;
  uint64_t offset;
  uint32_t resource_id;
  uint32_t padding;
};
static_assert(sizeof(TransferToHost2d) == 56 && offsetof(TransferToHost2d, offset) == 40 &&
              offsetof(TransferToHost2d, resource_id) == 48);

// Followed by nr_entries of MemEntry.
struct ResourceAttachBacking {
  Header header;
  uint32_t resource_id;
  uint32_t nr_entries;
};
static_assert(sizeof(ResourceAttachBacking) == 32 &&
              offsetof(ResourceAttachBacking, nr_entries) == 28);

struct MemEntry {
  uint64_t addr;
  uint32_t length;
  uint32_t padding;
};
static_assert(sizeof(MemEntry) == 16 && offsetof(MemEntry, length) == 8);

struct CursorPos {
  uint32_t scanout_id;
  uint32_t x;
  uint32_t y;
  uint32_t padding;
};
static_assert(sizeof(CursorPos) == 16);

// UPDATE_CURSOR and MOVE_CURSOR (5.7.6.10).
struct UpdateCursor {
  Header header;
  CursorPos pos;
  uint32_t resource_id;
  uint32_t hot_x;
  uint32_t hot_y;
  uint32_t padding;
};
static_assert(sizeof(UpdateCursor) == 56 && offsetof(UpdateCursor, pos) == 24 &&
              offsetof(UpdateCursor, resource_id) == 40 && offsetof(UpdateCursor, hot_y) == 48);

// The structure at `offset`, copied; nullopt when the bytes end before it does.
template <typename T>
std::optional<T> ReadAt(std::span<const std::byte> bytes, size_t offset = 0) {
  static_assert(std::is_trivially_copyable_v<T>);
  if (offset > bytes.size() || bytes.size() - offset < sizeof(T)) return std::nullopt;
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof(T));
  return value;
}

}  // namespace mvgpu::gpu::wire
