#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <span>

#include "apionly-domain/base/address.h"
#include "vmm-glue/vfio_user/commands.h"
#include "vmm-glue/vfio_user/protocol.h"

namespace mvgpu::glue::vfio_user {

namespace {

// The region of an access that lies inside it. Only an access that no driver can cause fails: no
// length of an error reply to a read suits every client, and one of them waits for the data for
// ever.
Result<VfioDevice::RegionInfo> CheckAccess(const VfioDevice& device, const RegionAccess& access) {
  if (access.region >= kRegionCount) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("region index is {}, the device has {}", access.region, kRegionCount));
  }
  if (access.count > kMaxTransfer) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("count is {}, at most {} are allowed", access.count, kMaxTransfer));
  }
  const VfioDevice::RegionInfo info = device.region_info(access.region);
  const std::optional<uint64_t> end = CheckedAdd(access.offset, access.count);
  if (!end || *end > info.size) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("offset {:#x} and count {}, region {} has {} bytes", access.offset,
                            access.count, access.region, info.size));
  }
  return info;
}

// Writes to a region that is read-only vanish, as on a real bus.
Result<void> Write(VfioDevice& device, const RegionAccess& access,
                   std::span<const std::byte> data) {
  MVGPU_ASSIGN_OR_RETURN(const VfioDevice::RegionInfo info, CheckAccess(device, access));
  if (info.writable && !data.empty()) device.region_write(access.region, access.offset, data);
  return {};
}

}  // namespace

Result<void> ReadRegion(VfioDevice& device, Message& message, Payload& reply) {
  MVGPU_ASSIGN_OR_RETURN(const auto access, ReadStruct<RegionAccess>(message.payload));
  MVGPU_ASSIGN_OR_RETURN(const VfioDevice::RegionInfo info, CheckAccess(device, access));
  AppendStruct(reply, access);
  if (access.count == 0) return {};
  // What a read sees that nobody answers: all ones.
  reply.resize(sizeof(access) + access.count, std::byte{0xff});
  if (info.readable) {
    device.region_read(access.region, access.offset, std::span(reply).subspan(sizeof(access)));
  }
  return {};
}

Result<void> WriteRegion(VfioDevice& device, Message& message, Payload& reply) {
  MVGPU_ASSIGN_OR_RETURN(const auto access, ReadStruct<RegionAccess>(message.payload));
  const auto data = std::span<const std::byte>(message.payload).subspan(sizeof(access));
  if (data.size() != access.count) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("{} bytes of data for count {}", data.size(), access.count));
  }
  MVGPU_RETURN_IF_ERROR(Write(device, access, data));
  AppendStruct(reply, access);
  return {};
}

// Writes that QEMU had to queue behind a full socket, in order. The first bad one ends it.
Result<void> WriteRegionMulti(VfioDevice& device, Message& message, Payload& reply) {
  MVGPU_ASSIGN_OR_RETURN(const auto head, ReadStruct<RegionWriteMulti>(message.payload));
  const auto expected_size = CheckedMul(head.count, sizeof(SmallWrite));
  if (!expected_size || *expected_size != message.payload.size() - sizeof(head)) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("{} bytes for {} writes of {} bytes",
                            message.payload.size() - sizeof(head), head.count, sizeof(SmallWrite)));
  }
  for (uint64_t i = 0; i < head.count; ++i) {
    MVGPU_ASSIGN_OR_RETURN(
        const auto write,
        ReadStruct<SmallWrite>(message.payload, sizeof(head) + i * sizeof(SmallWrite)));
    if (write.count > sizeof(write.data)) {
      return Fail(ErrorCode::kInvalid, fmt::format("write {} has count {}, at most {} are allowed",
                                                   i, write.count, sizeof(write.data)));
    }
    MVGPU_RETURN_IF_ERROR(Write(device, {write.offset, write.region, write.count},
                                std::span(write.data).first(write.count)));
  }
  AppendStruct(reply, head);
  return {};
}

}  // namespace mvgpu::glue::vfio_user
