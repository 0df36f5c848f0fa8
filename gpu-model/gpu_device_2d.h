#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include <absl/container/flat_hash_map.h>

#include "gpu-model/gpu_device.h"
#include "gpu-model/page_budget.h"
#include "gpu-model/pixel_buffer.h"
#include "gpu-model/protocol.h"
#include "gpu-model/resource.h"
#include "gpu-model/scanout.h"

namespace mvgpu::gpu {

// The device behind GpuDevice::Create(). Where virtio 1.2 leaves open what a bad request is
// answered with, and in which order things are checked, it does as QEMU's hw/display/virtio-gpu.c.
//
// Its commands are in resource_commands.cc and scanout_commands.cc; the rest is in
// gpu_device_2d.cc.
class GpuDevice2d final : public GpuDevice,
                          private dma::DmaUser::Owner,
                          private domain::DmaSpace::User {
 public:
  // REQUIRES: a configuration that GpuDevice::Create() has checked.
  GpuDevice2d(const GpuConfig& config, dma::DmaCache* cache, const domain::ApiOnlyDomain* domain,
              Display* display, GpuDevice::Owner* owner, domain::DmaSpace* space);
  ~GpuDevice2d() override;

  uint64_t features() const override { return wire::kFeatureEdid; }
  // The only feature allows a command; like QEMU, the device answers it in any case.
  void set_driver_features(uint64_t) override {}

  void read_config(uint32_t offset, std::span<std::byte> data) const override;
  void write_config(uint32_t offset, std::span<const std::byte> data) override;

  Result<uint32_t> execute_control(std::span<const std::byte> request,
                                   std::span<std::byte> response) override;
  void execute_cursor(std::span<const std::byte> request) override;
  void reset() override;

  std::optional<FrameView> frame(uint32_t scanout) const override;
  CursorState cursor(uint32_t scanout) const override;
  Result<void> set_preferred_mode(uint32_t scanout, Size mode) override;
  Counters counters() const override;

 private:
  using Request = std::span<const std::byte>;
  // The answer to a request; the payload, if any, stands behind the header in the response already.
  struct Answer {
    wire::Response type;
    uint32_t payload_bytes = 0;
  };

  struct Head {
    Size preferred_mode;
    Scanout scanout;
    CursorState cursor;
  };

  // No hardware has the addresses: a copy looks for itself whether its pages are still there.
  void on_revoke(IovaRange) override {}
  void on_invalidated(IovaRange range) override;

  // Errors: kPending.
  Result<Answer> Execute(wire::Command command, Request request, std::span<std::byte> payload);

  // resource_commands.cc
  wire::Response ResourceCreate2d(Request request);
  wire::Response ResourceUnref(Request request);
  Result<wire::Response> ResourceAttachBacking(Request request);
  wire::Response ResourceDetachBacking(Request request);
  Result<wire::Response> TransferToHost2d(Request request);

  // scanout_commands.cc
  Answer GetDisplayInfo(std::span<std::byte> payload) const;
  Answer GetEdid(Request request, std::span<std::byte> payload) const;
  wire::Response SetScanout(Request request);
  wire::Response ResourceFlush(Request request);
  bool UpdateCursor(Request request);
  void DisableScanout(uint32_t index);

  // What the guest is told about an error that is not in its request; the owner hears the whole.
  wire::Response Refuse(const Error& error);
  Resource* FindResource(uint32_t id) const;
  // The resource if it exists and has a backing; otherwise `error` says what to answer.
  Resource* FindBackedResource(uint32_t id, wire::Response* error) const;
  void DestroyResource(uint32_t id);

  const GpuConfig config_;
  const std::unique_ptr<dma::DmaUser> user_;   // of the cache; outlives the resources below
  const domain::ApiOnlyDomain* const domain_;  // these outlive the device: contract of
  Display* const display_;                     // GpuDevice::Create()
  GpuDevice::Owner* const owner_;
  domain::DmaSpace* const space_;  // likewise; may be null

  uint32_t events_read_ = 0;
  Counters counters_;   // those that only grow; the others are computed
  PixelBudget budget_;  // these two outlive the resources and heads below
  PageBudget translated_;
  absl::flat_hash_map<uint32_t, std::unique_ptr<Resource>> resources_;
  std::vector<Head> heads_;
};

// OUT_OF_MEMORY for what a limit refused, UNSPEC for everything else: what the guest is told when
// its pages could not be pinned, mapped or read.
wire::Response ResponseOf(const Error& error);

// True when the rectangle lies inside the picture; it may be empty. Sums are made in 64 bits.
bool IsInside(const wire::Rectangle& rect, Size size);

}  // namespace mvgpu::gpu
