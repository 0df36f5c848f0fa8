#include "gpu-model/gpu_device_2d.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "apionly-domain/base/check.h"
#include "gpu-model/edid.h"

namespace mvgpu::gpu {

namespace {

Result<void> CheckConfig(const GpuConfig& config) {
  if (config.scanouts == 0 || config.scanouts > wire::kMaxScanouts) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("{} scanouts; choose 1 to {}", config.scanouts, wire::kMaxScanouts));
  }
  if (config.max_resources == 0 || config.max_backing_entries == 0) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("at most {} resources of {} backing entries; choose at least 1 of both",
                            config.max_resources, config.max_backing_entries));
  }
  return CheckPreferredMode(config.preferred_mode, config.largest_mode);
}

}  // namespace

Result<std::unique_ptr<GpuDevice>> GpuDevice::Create(GpuConfig config, dma::DmaCache* cache,
                                                     const domain::ApiOnlyDomain* domain,
                                                     Display* display, Owner* owner,
                                                     domain::DmaSpace* space) {
  MVGPU_RETURN_IF_ERROR(CheckConfig(config));
  return std::make_unique<GpuDevice2d>(config, cache, domain, display, owner, space);
}

GpuDevice2d::GpuDevice2d(const GpuConfig& config, dma::DmaCache* cache,
                         const domain::ApiOnlyDomain* domain, Display* display,
                         GpuDevice::Owner* owner, domain::DmaSpace* space)
    : config_(config),
      user_(cache->open_user(this)),
      domain_(domain),
      display_(display),
      owner_(owner),
      space_(space),
      budget_(config.host_memory_limit),
      translated_(config.max_translated_pages) {
  if (space_ != nullptr) space_->set_user(this);
  heads_.resize(config.scanouts);
  for (Head& head : heads_) head.preferred_mode = config.preferred_mode;
}

// Displays are told nothing: they may be gone sooner than a device that was not reset.
GpuDevice2d::~GpuDevice2d() {
  if (space_ != nullptr) space_->set_user(nullptr);
}

void GpuDevice2d::on_invalidated(IovaRange range) {
  for (const auto& [id, resource] : resources_) resource->forget(range);
}

void GpuDevice2d::read_config(uint32_t offset, std::span<std::byte> data) const {
  const wire::Config config{events_read_, 0, config_.scanouts, 0};
  std::fill(data.begin(), data.end(), std::byte{0});
  if (data.empty() || offset >= sizeof(config)) return;
  std::memcpy(data.data(), reinterpret_cast<const std::byte*>(&config) + offset,
              std::min<size_t>(data.size(), sizeof(config) - offset));
}

void GpuDevice2d::write_config(uint32_t offset, std::span<const std::byte> data) {
  // events_clear is the only field that a driver may write (5.7.4): bits written as 1 are
  // acknowledged.
  wire::Config config{};
  if (data.empty() || offset >= sizeof(config)) return;
  std::memcpy(reinterpret_cast<std::byte*>(&config) + offset, data.data(),
              std::min<size_t>(data.size(), sizeof(config) - offset));
  events_read_ &= ~config.events_clear;
}

Result<uint32_t> GpuDevice2d::execute_control(std::span<const std::byte> request,
                                              std::span<std::byte> response) {
  Answer answer{wire::Response::kErrUnspec};
  wire::Header reply{};
  if (const auto header = wire::ReadAt<wire::Header>(request)) {
    const auto payload = response.subspan(std::min(response.size(), sizeof(reply)));
    MVGPU_ASSIGN_OR_RETURN(answer,
                           Execute(static_cast<wire::Command>(header->type), request, payload));
    // 5.7.6.7: a fenced request is answered when it is done; everything here is done by now.
    if ((header->flags & wire::kFlagFence) != 0) {
      reply.flags = wire::kFlagFence;
      reply.fence_id = header->fence_id;
      reply.ctx_id = header->ctx_id;
      if ((header->flags & wire::kFlagInfoRingIdx) != 0) {
        reply.flags |= wire::kFlagInfoRingIdx;
        reply.ring_idx = header->ring_idx;
      }
    }
  }
  ++counters_.control_commands;
  reply.type = static_cast<uint32_t>(answer.type);
  if (answer.type >= wire::Response::kErrUnspec) ++counters_.failed_commands;
  const size_t size = std::min(response.size(), sizeof(reply));
  if (size != 0) std::memcpy(response.data(), &reply, size);
  return static_cast<uint32_t>(size) + answer.payload_bytes;
}

Result<GpuDevice2d::Answer> GpuDevice2d::Execute(wire::Command command, Request request,
                                                 std::span<std::byte> payload) {
  switch (command) {
    case wire::Command::kGetDisplayInfo:
      return GetDisplayInfo(payload);
    case wire::Command::kGetEdid:
      return GetEdid(request, payload);
    case wire::Command::kResourceCreate2d:
      return Answer{ResourceCreate2d(request)};
    case wire::Command::kResourceUnref:
      return Answer{ResourceUnref(request)};
    case wire::Command::kSetScanout:
      return Answer{SetScanout(request)};
    case wire::Command::kResourceFlush:
      return Answer{ResourceFlush(request)};
    case wire::Command::kTransferToHost2d:
      return TransferToHost2d(request).map([](wire::Response type) { return Answer{type}; });
    case wire::Command::kResourceAttachBacking:
      return ResourceAttachBacking(request).map([](wire::Response type) { return Answer{type}; });
    case wire::Command::kResourceDetachBacking:
      return Answer{ResourceDetachBacking(request)};
    default:
      return Answer{wire::Response::kErrUnspec};
  }
}

void GpuDevice2d::execute_cursor(std::span<const std::byte> request) {
  ++counters_.cursor_commands;
  if (!UpdateCursor(request)) ++counters_.failed_commands;
}

void GpuDevice2d::reset() {
  for (uint32_t i = 0; i < config_.scanouts; ++i) {
    DisableScanout(i);
    heads_[i].cursor = {};
  }
  resources_.clear();
  events_read_ = 0;
}

std::optional<FrameView> GpuDevice2d::frame(uint32_t scanout) const {
  if (scanout >= config_.scanouts || !heads_[scanout].scanout.is_on()) return std::nullopt;
  return heads_[scanout].scanout.frame();
}

CursorState GpuDevice2d::cursor(uint32_t scanout) const {
  MVGPU_CHECK(scanout < config_.scanouts);
  return heads_[scanout].cursor;
}

Result<void> GpuDevice2d::set_preferred_mode(uint32_t scanout, Size mode) {
  if (scanout >= config_.scanouts) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("scanout {}; this device has {}", scanout, config_.scanouts));
  }
  MVGPU_RETURN_IF_ERROR(CheckPreferredMode(mode, config_.largest_mode));
  if (heads_[scanout].preferred_mode == mode) return {};
  heads_[scanout].preferred_mode = mode;
  events_read_ |= wire::kEventDisplay;
  owner_->on_display_event();
  return {};
}

GpuDevice::Counters GpuDevice2d::counters() const {
  Counters counters = counters_;
  counters.resources = resources_.size();
  for (const auto& [id, resource] : resources_) {
    counters.attached_entries += resource->backing_entries();
  }
  counters.host_bytes = budget_.used();
  counters.translated_pages = translated_.used();
  return counters;
}

wire::Response ResponseOf(const Error& error) {
  return error.code() == ErrorCode::kLimit ? wire::Response::kErrOutOfMemory
                                           : wire::Response::kErrUnspec;
}

bool IsInside(const wire::Rectangle& rect, Size size) {
  return uint64_t{rect.x} + rect.width <= size.width &&
         uint64_t{rect.y} + rect.height <= size.height;
}

}  // namespace mvgpu::gpu
