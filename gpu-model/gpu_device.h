#pragma once

// The virtio-gpu device (virtio 1.2, 5.7), 2D: commands, resources, scanouts. It knows no VMM, no
// socket and no queue: a request goes in, a response comes out. Guest memory is reached through the
// DmaCache, and where it has no file, so that nobody can hold it, by copies of the domain.
//
// - RESOURCE_ATTACH_BACKING pins and maps the guest pages; the resource holds the mappings.
// - TRANSFER_TO_HOST_2D asks the cache for the pages of the rectangle again (hits) and copies.
// - RESOURCE_FLUSH shows the damage on every scanout that the resource is bound to.
// - DETACH_BACKING, UNREF and a reset give the mappings up.
//
// When the VMM takes memory away under an attached resource, the mappings are revoked, but the list
// of pages stays: the next transfer pins and maps what is there then, or answers the guest with an
// error.
//
// Addresses in backings are those of guest memory, or of a DmaSpace (a PASID behind the guest's
// IOMMU), where the device translates them when it attaches or uses them, keeps the result, and
// lets go of everything behind it when the guest invalidates it.
//
// Where to read next: gpu_device_2d.h (the device), protocol.h (wire structures), resource.h,
// scanout.h, edid.h, display/display.h (where pictures go: screenshot.h, fan_out.h, frame_hash.h).

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/viommu/dma_space.h"
#include "dma-cache/dma_cache.h"
#include "gpu-model/display/display.h"

namespace mvgpu::gpu {

struct GpuConfig {
  uint32_t scanouts = 1;                    // 1..16 (VIRTIO_GPU_MAX_SCANOUTS)
  Size preferred_mode{1280, 800};           // what EDID and GET_DISPLAY_INFO prefer
  Size largest_mode{4096, 2160};            // width and height limits of EDID modes
  uint64_t host_memory_limit = 256u << 20;  // bytes of all resources' host pixels together
  uint32_t max_resources = 4096;
  uint32_t max_backing_entries = 16384;      // per resource, as QEMU
  uint64_t max_translated_pages = 1u << 18;  // of all backings in a DmaSpace; the largest picture
};

// The guest's hardware cursor on one scanout. Tracked, never drawn into the frame, as in QEMU's
// screendump.
struct CursorState {
  uint32_t resource_id = 0;  // 64x64 pixels; 0: no cursor
  uint32_t x = 0;
  uint32_t y = 0;
  uint32_t hot_x = 0;
  uint32_t hot_y = 0;
  bool operator==(const CursorState&) const = default;
};

// Not thread-safe: one thread at a time.
class GpuDevice {
 public:
  // Told about things that the transport must pass on to the guest. Outlives the device.
  class Owner {
   public:
    virtual ~Owner() = default;
    // events_read changed (VIRTIO_GPU_EVENT_DISPLAY): raise the configuration interrupt.
    virtual void on_display_event() = 0;
    // A request was refused for a reason that the guest is not told: pages that could not be
    // pinned, mapped or read, memory that ran out. A guest can cause this as often as it likes.
    virtual void on_refused(const Error& /*why*/) {}
  };
  struct Counters {
    uint64_t control_commands = 0;
    uint64_t cursor_commands = 0;
    uint64_t failed_commands = 0;    // answered with an error
    uint64_t frames = 0;             // flushes shown on a scanout
    uint64_t transferred_bytes = 0;  // copied out of guest memory
    uint64_t resources = 0;          // now
    uint64_t attached_entries = 0;   // now, over all resources
    uint64_t host_bytes = 0;         // host pixels now
    uint64_t translated_pages = 0;   // now, of backings in a DmaSpace
  };

  // Cache, domain, display, owner and space outlive the device; the cache is one of this domain;
  // without a space, backings are addresses of guest memory. Errors: kInvalid for an impossible
  // configuration.
  static Result<std::unique_ptr<GpuDevice>> Create(GpuConfig config, dma::DmaCache* cache,
                                                   const domain::ApiOnlyDomain* domain,
                                                   Display* display, Owner* owner,
                                                   domain::DmaSpace* space = nullptr);
  virtual ~GpuDevice() = default;

  // Bits of virtio 1.2, 5.7.3 that the device offers: VIRTIO_GPU_F_EDID.
  virtual uint64_t features() const = 0;
  virtual void set_driver_features(uint64_t features) = 0;

  // struct virtio_gpu_config (16 bytes).
  virtual void read_config(uint32_t offset, std::span<std::byte> data) const = 0;
  virtual void write_config(uint32_t offset, std::span<const std::byte> data) = 0;

  // One request of the control queue; returns response bytes written (at least a header when it
  // fits). Errors: kPending, when guest memory is not at hand: nothing was done, nothing counted,
  // and the same request is to come again.
  virtual Result<uint32_t> execute_control(std::span<const std::byte> request,
                                           std::span<std::byte> response) = 0;
  // One request of the cursor queue; has no response.
  virtual void execute_cursor(std::span<const std::byte> request) = 0;

  // Destroys all resources and disables all scanouts.
  virtual void reset() = 0;

  // What scanout `scanout` shows now; nullopt when it is off. Valid until the next command.
  virtual std::optional<FrameView> frame(uint32_t scanout) const = 0;
  // REQUIRES: scanout < GpuConfig::scanouts.
  virtual CursorState cursor(uint32_t scanout) const = 0;

  // The viewer wants another size: the guest is told (VIRTIO_GPU_EVENT_DISPLAY) and asks for the
  // new EDID. Errors: kInvalid (no such scanout; a mode that an EDID cannot say, or beyond
  // largest_mode).
  virtual Result<void> set_preferred_mode(uint32_t scanout, Size mode) = 0;

  virtual Counters counters() const = 0;
};

}  // namespace mvgpu::gpu
