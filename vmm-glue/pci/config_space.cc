#include "vmm-glue/pci/config_space.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "apionly-domain/base/check.h"

namespace mvgpu::glue {

namespace {

static_assert(std::endian::native == std::endian::little);

// PCI Local Bus 3.0, 6.1 (type 0 header) and 6.2.
constexpr uint32_t kVendorId = 0x00;
constexpr uint32_t kDeviceId = 0x02;
constexpr uint32_t kCommand = 0x04;
constexpr uint32_t kStatus = 0x06;
constexpr uint32_t kRevision = 0x08;  // the class code is the upper 24 bits of the same word
constexpr uint32_t kCacheLineSize = 0x0c;
constexpr uint32_t kBars = 0x10;
constexpr uint32_t kSubsystemVendorId = 0x2c;
constexpr uint32_t kSubsystemId = 0x2e;
constexpr uint32_t kCapabilities = 0x34;
constexpr uint32_t kInterruptLine = 0x3c;

// Memory space, bus master, parity response, SERR#, INTx disable.
constexpr uint16_t kCommandWritable = 0x0002 | 0x0004 | 0x0040 | 0x0100 | 0x0400;
constexpr uint16_t kStatusCapabilityList = 0x0010;
constexpr uint32_t kBarMemory64 = 0x4;
constexpr uint32_t kBarPrefetchable = 0x8;
constexpr unsigned kBarCount = 6;

}  // namespace

ConfigSpace::ConfigSpace(const Identity& identity) {
  Define<uint16_t>(kVendorId, identity.vendor_id, 0);
  Define<uint16_t>(kDeviceId, identity.device_id, 0);
  Define<uint16_t>(kCommand, 0, kCommandWritable);
  Define<uint16_t>(kStatus, kStatusCapabilityList, 0);
  Define<uint32_t>(kRevision, identity.class_code << 8 | identity.revision, 0);
  Define<uint8_t>(kCacheLineSize, 0, 0xff);
  Define<uint16_t>(kSubsystemVendorId, identity.subsystem_vendor_id, 0);
  Define<uint16_t>(kSubsystemId, identity.subsystem_id, 0);
  Define<uint8_t>(kCapabilities, 0, 0);
  Define<uint8_t>(kInterruptLine, 0,
                  0xff);  // scratch for firmware; the pin behind it stays 0: no INTx
}

template <typename T>
void ConfigSpace::Define(uint32_t offset, T value, T writable) {
  std::memcpy(&defaults_[offset], &value, sizeof(T));
  std::memcpy(&bytes_[offset], &value, sizeof(T));
  std::memcpy(&writable_[offset], &writable, sizeof(T));
}

void ConfigSpace::add_bar(unsigned index, BarKind kind, uint32_t size) {
  MVGPU_CHECK(std::has_single_bit(size) && size >= 4096);
  const bool is_64_bit = kind == BarKind::kMemory64Prefetchable;
  MVGPU_CHECK(index + (is_64_bit ? 1 : 0) < kBarCount);
  const uint32_t offset = kBars + 4 * index;
  Define<uint32_t>(offset, is_64_bit ? kBarMemory64 | kBarPrefetchable : 0, ~(size - 1));
  if (is_64_bit) Define<uint32_t>(offset + 4, 0, 0xffffffff);
}

uint32_t ConfigSpace::add_capability(uint8_t id, std::span<const std::byte> body,
                                     std::span<const std::byte> writable) {
  MVGPU_CHECK(body.size() == writable.size());
  const uint32_t start = next_capability_;
  MVGPU_CHECK(start + 2 + body.size() <= kSize);
  // Linked in front of the others, whose pointer moves here.
  Define<uint8_t>(start, id, 0);
  Define<uint8_t>(start + 1, static_cast<uint8_t>(defaults_[kCapabilities]), 0);
  Define<uint8_t>(kCapabilities, static_cast<uint8_t>(start), 0);
  for (uint32_t i = 0; i < body.size(); ++i) Define(start + 2 + i, body[i], writable[i]);
  next_capability_ = (start + 2 + static_cast<uint32_t>(body.size()) + 3) & ~3u;
  return start;
}

void ConfigSpace::read(uint32_t offset, std::span<std::byte> data) const {
  std::fill(data.begin(), data.end(), std::byte{0});
  if (offset >= kSize) return;
  const size_t count = std::min<size_t>(data.size(), kSize - offset);
  std::copy_n(bytes_.begin() + offset, count, data.begin());
}

void ConfigSpace::write(uint32_t offset, std::span<const std::byte> data) {
  for (size_t i = 0; i < data.size() && offset + i < kSize; ++i) {
    const std::byte mask = writable_[offset + i];
    bytes_[offset + i] = (bytes_[offset + i] & ~mask) | (data[i] & mask);
  }
}

void ConfigSpace::set(uint32_t offset, std::span<const std::byte> data) {
  MVGPU_CHECK(offset <= kSize && data.size() <= kSize - offset);
  std::copy(data.begin(), data.end(), bytes_.begin() + offset);
}

}  // namespace mvgpu::glue
