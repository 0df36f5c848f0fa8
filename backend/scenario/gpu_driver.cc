#include "backend/scenario/gpu_driver.h"

#include <fmt/format.h>

#include <cstring>

#include "apionly-domain/base/check.h"
#include "gpu-model/protocol.h"
#include "vmm-glue/virtio/common_config.h"
#include "vmm-glue/virtio/ring_format.h"

namespace mvgpu::backend::scenario {

namespace {

namespace ring = glue::ring;

// PCI capabilities, and those of virtio among them (virtio 1.2, 4.1.4).
constexpr uint32_t kCapabilityPointer = 0x34;
constexpr uint32_t kFirstCapability = 0x40;
constexpr int kMostCapabilities = 48;
constexpr uint8_t kVendorCapability = 0x09;
constexpr uint8_t kCommonType = 1;
constexpr uint8_t kNotifyType = 2;

// The common configuration structure (4.1.4.3).
constexpr uint64_t kDriverFeatureSelect = 8;
constexpr uint64_t kDriverFeature = 12;
constexpr uint64_t kDeviceStatus = 20;
constexpr uint64_t kQueueSelect = 22;
constexpr uint64_t kQueueSizeField = 24;
constexpr uint64_t kQueueEnable = 28;
constexpr uint64_t kQueueNotifyOffset = 30;
constexpr uint64_t kQueueAddresses = 32;  // descriptors, available ring, used ring

// Where what is in the first page; the request is in the second.
constexpr uint16_t kQueueSize = 8;
constexpr uint64_t kDescriptors = 0;
constexpr uint64_t kAvailable = 0x100;
constexpr uint64_t kUsed = 0x200;
constexpr uint64_t kResponse = 0x400;
constexpr uint64_t kRequest = kPageSize;

}  // namespace

template <typename T>
T GpuDriver::Read(uint32_t region, uint64_t offset) {
  T value{};
  device_.region_read(region, offset, std::as_writable_bytes(std::span(&value, 1)));
  return value;
}

template <typename T>
void GpuDriver::Write(uint32_t region, uint64_t offset, T value) {
  device_.region_write(region, offset, std::as_bytes(std::span(&value, 1)));
}

template <typename T>
void GpuDriver::Put(uint64_t offset, const T& value) {
  std::memcpy(memory_ + offset, &value, sizeof(value));
}

bool GpuDriver::FindStructures() {
  constexpr uint32_t kSpace = glue::kRegionConfig;
  common_.reset();
  notify_.reset();
  uint32_t at = Read<uint8_t>(kSpace, kCapabilityPointer) & 0xfcu;
  for (int i = 0; i < kMostCapabilities && at >= kFirstCapability; ++i) {
    const auto type = Read<uint8_t>(kSpace, at + 3);
    if (Read<uint8_t>(kSpace, at) == kVendorCapability) {
      const Structure structure{Read<uint8_t>(kSpace, at + 4), Read<uint32_t>(kSpace, at + 8)};
      if (type == kCommonType) common_ = structure;
      if (type == kNotifyType) {
        notify_ = structure;
        multiplier_ = Read<uint32_t>(kSpace, at + 16);
      }
    }
    at = Read<uint8_t>(kSpace, at + 1) & 0xfcu;
  }
  return common_ && notify_;
}

bool GpuDriver::Negotiate() {
  const auto [bar, base] = *common_;
  uint8_t status = 0;
  Write<uint8_t>(bar, base + kDeviceStatus, status);
  for (const uint8_t bit : {glue::kStatusAcknowledge, glue::kStatusDriver}) {
    status |= bit;
    Write<uint8_t>(bar, base + kDeviceStatus, status);
  }
  Write<uint32_t>(bar, base + kDriverFeatureSelect, 1);
  Write<uint32_t>(bar, base + kDriverFeature, static_cast<uint32_t>(glue::kFeatureVersion1 >> 32));
  Write<uint8_t>(bar, base + kDeviceStatus, status | glue::kStatusFeaturesOk);
  return (Read<uint8_t>(bar, base + kDeviceStatus) & glue::kStatusFeaturesOk) != 0;
}

void GpuDriver::SetUpQueue() {
  const auto [bar, base] = *common_;
  Write<uint16_t>(bar, base + kQueueSelect, 0);
  Write<uint16_t>(bar, base + kQueueSizeField, kQueueSize);
  uint64_t field = base + kQueueAddresses;
  for (const uint64_t part : {kDescriptors, kAvailable, kUsed}) {
    Write<uint64_t>(bar, field, place_ + part);
    field += sizeof(uint64_t);
  }
  Write<uint16_t>(bar, base + kQueueEnable, 1);
  doorbell_ =
      notify_->offset + uint64_t{Read<uint16_t>(bar, base + kQueueNotifyOffset)} * multiplier_;
}

Result<void> GpuDriver::boot() {
  MVGPU_ASSIGN_OR_RETURN(memory_, guest_.at(place_, kBytes));
  if ((place_ & kPageMask) != 0) {
    return Fail(ErrorCode::kInvalid, fmt::format("rings at {:#x}: give a whole page", place_));
  }
  if (!FindStructures() || !Negotiate()) {
    return Fail(ErrorCode::kProtocol, "the vgpu is no virtio device of version 1");
  }
  std::memset(memory_, 0, kBytes);
  requests_ = 0;
  is_waiting_ = false;
  SetUpQueue();
  const auto [bar, base] = *common_;
  const auto status = Read<uint8_t>(bar, base + kDeviceStatus);
  Write<uint8_t>(bar, base + kDeviceStatus, static_cast<uint8_t>(status | glue::kStatusDriverOk));
  return {};
}

Result<void> GpuDriver::submit(std::span<const std::byte> request) {
  MVGPU_CHECK(memory_ != nullptr && request.size() <= kMostRequestBytes);
  if (is_waiting_) {
    return Fail(ErrorCode::kBusy, "a request is under way: 'gpu-answer' comes first");
  }
  std::memcpy(memory_ + kRequest, request.data(), request.size());
  constexpr uint32_t kResponseBytes = sizeof(gpu::wire::Header);
  Put(kDescriptors, ring::Descriptor{place_ + kRequest, static_cast<uint32_t>(request.size()),
                                     ring::kDescriptorNext, 1});
  Put(kDescriptors + sizeof(ring::Descriptor),
      ring::Descriptor{place_ + kResponse, kResponseBytes, ring::kDescriptorWrite, 0});
  Put(kAvailable + ring::AvailableEntry(requests_ % kQueueSize), uint16_t{0});
  Put(kAvailable + ring::kAvailableIndex, ++requests_);
  is_waiting_ = true;
  Write<uint16_t>(notify_->bar, doorbell_, 0);
  return {};
}

std::optional<uint32_t> GpuDriver::take_response() {
  uint16_t used = 0;
  if (!is_waiting_) return std::nullopt;
  std::memcpy(&used, memory_ + kUsed + ring::kUsedIndex, sizeof(used));
  if (used != requests_) return std::nullopt;
  is_waiting_ = false;
  uint32_t type = 0;
  std::memcpy(&type, memory_ + kResponse, sizeof(type));
  return type;
}

}  // namespace mvgpu::backend::scenario
