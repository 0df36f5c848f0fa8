// Commands of GpuDevice2d about what is shown: modes, scanouts, cursors (virtio 1.2, 5.7.6.8
// and 5.7.6.10).

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "gpu-model/edid.h"
#include "gpu-model/gpu_device_2d.h"

namespace mvgpu::gpu {

using wire::Response;

namespace {

constexpr uint32_t kSmallestScanout = 16;  // QEMU's limit for both dimensions
constexpr uint32_t kCursorSize = 64;       // 5.7.6.10: both dimensions

// Copies as much as the guest has room for; returns the bytes copied.
template <typename T>
uint32_t WritePayload(const T& payload, std::span<std::byte> destination) {
  const size_t size = std::min(sizeof(payload), destination.size());
  if (size != 0) std::memcpy(destination.data(), &payload, size);
  return static_cast<uint32_t>(size);
}

}  // namespace

GpuDevice2d::Answer GpuDevice2d::GetDisplayInfo(std::span<std::byte> payload) const {
  wire::DisplayInfo info{};
  uint32_t x = 0;  // heads stand side by side
  for (size_t i = 0; i < heads_.size(); ++i) {
    const Size mode = heads_[i].preferred_mode;
    info.modes[i].rect = {x, 0, mode.width, mode.height};
    info.modes[i].enabled = 1;
    x += mode.width;
  }
  return {Response::kOkDisplayInfo, WritePayload(info, payload)};
}

GpuDevice2d::Answer GpuDevice2d::GetEdid(Request request, std::span<std::byte> payload) const {
  const auto command = wire::ReadAt<wire::GetEdid>(request);
  if (!command || command->scanout >= config_.scanouts) return {Response::kErrInvalidParameter};
  const EdidBlob blob = MakeEdid({heads_[command->scanout].preferred_mode, config_.largest_mode,
                                  "mvgpu", fmt::format("head {}", command->scanout)});
  wire::Edid edid{};
  static_assert(sizeof(blob) <= sizeof(edid.data));
  edid.size = static_cast<uint32_t>(blob.size());
  std::memcpy(edid.data, blob.data(), blob.size());
  return {Response::kOkEdid, WritePayload(edid, payload)};
}

Response GpuDevice2d::SetScanout(Request request) {
  const auto command = wire::ReadAt<wire::SetScanout>(request);
  if (!command) return Response::kErrInvalidParameter;
  if (command->scanout_id >= config_.scanouts) return Response::kErrInvalidScanoutId;
  if (command->resource_id == 0) {
    DisableScanout(command->scanout_id);
    return Response::kOkNodata;
  }
  Response error{};
  const Resource* resource = FindBackedResource(command->resource_id, &error);
  if (resource == nullptr) return error;
  const wire::Rectangle& rect = command->rect;
  if (rect.width < kSmallestScanout || rect.height < kSmallestScanout ||
      !IsInside(rect, resource->size())) {
    return Response::kErrInvalidParameter;
  }
  Scanout& scanout = heads_[command->scanout_id].scanout;
  const auto changed = scanout.bind(*resource, {rect.x, rect.y, rect.width, rect.height}, &budget_);
  if (!changed) return Refuse(changed.error());
  if (*changed) {
    display_->on_frame(command->scanout_id, scanout.frame(), {0, 0, rect.width, rect.height});
  }
  return Response::kOkNodata;
}

void GpuDevice2d::DisableScanout(uint32_t index) {
  Scanout& scanout = heads_[index].scanout;
  if (!scanout.is_on()) return;
  scanout.disable();
  display_->on_disabled(index);
}

Response GpuDevice2d::ResourceFlush(Request request) {
  const auto command = wire::ReadAt<wire::ResourceFlush>(request);
  if (!command) return Response::kErrInvalidParameter;
  const Resource* resource = FindResource(command->resource_id);
  if (resource == nullptr) return Response::kErrInvalidResourceId;
  const wire::Rectangle& rect = command->rect;
  if (!IsInside(rect, resource->size())) return Response::kErrInvalidParameter;
  for (uint32_t i = 0; i < config_.scanouts; ++i) {
    Scanout& scanout = heads_[i].scanout;
    if (!scanout.shows(*resource)) continue;
    const auto damage = scanout.flush({rect.x, rect.y, rect.width, rect.height});
    if (!damage) continue;
    ++counters_.frames;
    display_->on_frame(i, scanout.frame(), *damage);
  }
  return Response::kOkNodata;
}

bool GpuDevice2d::UpdateCursor(Request request) {
  const auto command = wire::ReadAt<wire::UpdateCursor>(request);
  if (!command || command->pos.scanout_id >= config_.scanouts) return false;
  CursorState& cursor = heads_[command->pos.scanout_id].cursor;
  switch (static_cast<wire::Command>(command->header.type)) {
    case wire::Command::kMoveCursor:
      cursor.x = command->pos.x;
      cursor.y = command->pos.y;
      return true;
    case wire::Command::kUpdateCursor: {
      if (command->resource_id != 0) {
        const Resource* resource = FindResource(command->resource_id);
        if (resource == nullptr || resource->size() != Size{kCursorSize, kCursorSize}) return false;
      }
      cursor = {command->resource_id, command->pos.x, command->pos.y, command->hot_x,
                command->hot_y};
      return true;
    }
    default:
      return false;
  }
}

}  // namespace mvgpu::gpu
