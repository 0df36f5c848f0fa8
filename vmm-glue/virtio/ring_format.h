#pragma once

// A split virtqueue as it lies in guest memory (virtio 1.2, 2.7): the descriptor table, the
// available ring that the driver writes, the used ring that the device writes. Little-endian.

#include <bit>
#include <cstddef>
#include <cstdint>

namespace mvgpu::glue::ring {

static_assert(std::endian::native == std::endian::little);

inline constexpr uint16_t kMaxQueueSize = 32768;

// 2.7.5
struct Descriptor {
  uint64_t address;
  uint32_t length;
  uint16_t flags;
  uint16_t next;
};
static_assert(sizeof(Descriptor) == 16 && offsetof(Descriptor, length) == 8 &&
              offsetof(Descriptor, flags) == 12 && offsetof(Descriptor, next) == 14);
inline constexpr uint16_t kDescriptorNext = 1;
inline constexpr uint16_t kDescriptorWrite = 2;
inline constexpr uint16_t kDescriptorIndirect = 4;
inline constexpr uint64_t kDescriptorAlignment = 16;

// 2.7.6, available ring: flags, idx, ring[size], used_event.
inline constexpr uint16_t kAvailableNoInterrupt = 1;
inline constexpr uint64_t kAvailableAlignment = 2;
inline constexpr uint64_t kAvailableFlags = 0;
inline constexpr uint64_t kAvailableIndex = 2;
constexpr uint64_t AvailableEntry(uint16_t slot) { return 4 + 2u * slot; }
constexpr uint64_t UsedEvent(uint16_t size) { return AvailableEntry(size); }
constexpr uint64_t AvailableSize(uint16_t size) { return UsedEvent(size) + 2; }

// 2.7.8, used ring: flags, idx, ring[size] of UsedElement, avail_event.
struct UsedElement {
  uint32_t id;
  uint32_t length;
};
static_assert(sizeof(UsedElement) == 8 && offsetof(UsedElement, length) == 4);
inline constexpr uint64_t kUsedAlignment = 4;
inline constexpr uint64_t kUsedIndex = 2;
constexpr uint64_t UsedEntry(uint16_t slot) { return 4 + sizeof(UsedElement) * slot; }
constexpr uint64_t AvailableEvent(uint16_t size) { return UsedEntry(size); }
constexpr uint64_t UsedSize(uint16_t size) { return AvailableEvent(size) + 2; }

}  // namespace mvgpu::glue::ring
