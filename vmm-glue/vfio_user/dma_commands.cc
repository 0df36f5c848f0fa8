#include <fmt/format.h>

#include <optional>
#include <utility>

#include "apionly-domain/container.h"
#include "vmm-glue/vfio_user/commands.h"
#include "vmm-glue/vfio_user/protocol.h"

namespace mvgpu::glue::vfio_user {

namespace {

std::optional<domain::Access> AccessOf(uint32_t flags) {
  switch (flags & (kDmaMapRead | kDmaMapWrite)) {
    case kDmaMapRead:
      return domain::Access::kRead;
    case kDmaMapWrite:
      return domain::Access::kWrite;
    case kDmaMapRead | kDmaMapWrite:
      return domain::Access::kReadWrite;
    default:
      return std::nullopt;
  }
}

}  // namespace

// Alignment, overlap and the end of the file are the container's to check. Mappings without a
// descriptor are ordinary: ROMs, anonymous RAM, BARs of other devices.
Result<void> MapDma(VfioDevice& device, Message& message, Payload&) {
  MVGPU_ASSIGN_OR_RETURN(const auto map, ReadArguments<DmaMap>(message.payload));
  constexpr uint32_t kNeedFile = kDmaMapMustMmap | kDmaMapFileIo;
  constexpr uint32_t kKnown = kDmaMapRead | kDmaMapWrite | kNeedFile;
  const std::optional<domain::Access> access = AccessOf(map.flags);
  if ((map.flags & ~kKnown) != 0 || !access) {
    return Fail(
        ErrorCode::kInvalid,
        fmt::format("flags are {:#x}, known are {:#x} with read (1) or write (2) among them",
                    map.flags, kKnown));
  }
  if (message.fds.size() > 1 || ((map.flags & kNeedFile) != 0 && message.fds.empty())) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("{} descriptors came with flags {:#x}", message.fds.size(), map.flags));
  }
  domain::Container::MapRequest request;
  request.iova = Iova(map.iova);
  request.size = map.size;
  request.access = *access;
  if (!message.fds.empty()) {
    request.fd = std::move(message.fds.front());
    request.file_offset = map.fd_offset;
  }
  return device.dma_map(std::move(request));
}

// A range operation: it succeeds when nothing is mapped there, since vIOMMUs unmap huge powers of
// two at every domain switch. The reply is the request's 24 bytes again, which Cloud Hypervisor
// waits for.
Result<void> UnmapDma(VfioDevice& device, Message& message, Payload& reply) {
  MVGPU_ASSIGN_OR_RETURN(const auto unmap, ReadArguments<DmaUnmap>(message.payload));
  if (unmap.argsz > kMaxArgsz) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("argsz is {}, at most {} are allowed", unmap.argsz, kMaxArgsz));
  }
  // A dirty bitmap could only be asked for while dirty pages are tracked, which we do not offer.
  if ((unmap.flags & ~kDmaUnmapAll) != 0) {
    return Fail(ErrorCode::kInvalid, fmt::format("flags are {:#x}, only {:#x} (all) is supported",
                                                 unmap.flags, kDmaUnmapAll));
  }
  if ((unmap.flags & kDmaUnmapAll) != 0) {
    if (unmap.iova != 0 || unmap.size != 0) {
      return Fail(ErrorCode::kInvalid,
                  fmt::format("unmap of everything with iova {:#x} and size {:#x}, both must be 0",
                              unmap.iova, unmap.size));
    }
    MVGPU_RETURN_IF_ERROR(device.dma_unmap_all());
  } else {
    MVGPU_RETURN_IF_ERROR(device.dma_unmap(Iova(unmap.iova), unmap.size));
  }
  AppendStruct(reply, unmap);
  return {};
}

}  // namespace mvgpu::glue::vfio_user
