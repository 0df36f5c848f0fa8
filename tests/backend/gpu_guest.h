#pragma once

// A guest with RAM, a virtio-pci driver and a small virtio-gpu driver, over any VfioDevice: a vGPU
// in this process, or one at the other end of a socket.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "tests/fakes/guest_ram.h"
#include "tests/fakes/virtio_pci_driver.h"
#include "tests/fakes/virtqueue_driver.h"
#include "tests/gpu-model/wire.h"
#include "vmm-glue/vfio_device.h"

namespace mvgpu::testing {

namespace wire = mvgpu::gpu::testing;

// RAM is 8 MiB at kRam: the first MiB is for rings and requests, the rest for pictures, so that a
// VMM can take the pictures away and leave the rings.
class GpuGuest {
 public:
  static constexpr uint64_t kRam = 0x4000'0000;
  static constexpr uint64_t kLowSize = 1u << 20;
  static constexpr uint64_t kPictures = kRam + kLowSize;
  static constexpr uint64_t kPicturesSize = 7u << 20;
  static constexpr uint32_t kWidth = 64;
  static constexpr uint32_t kHeight = 48;  // a picture is three pages
  static constexpr uint32_t kPictureBytes = kWidth * kHeight * 4;

  // `wait` is called after a doorbell, until the device has answered; false: it gives up.
  GpuGuest(glue::VfioDevice* device, std::function<bool()> wait)
      : device_(*device), driver_(device), wait_(std::move(wait)) {}

  // The VMM's side. Without a file it maps memory that the device has to ask for.
  void set_files(bool low, bool pictures) {
    low_has_file_ = low;
    pictures_have_file_ = pictures;
  }
  Result<void> map_low();
  Result<void> map_pictures();
  Result<uint64_t> unmap_pictures();

  // The driver's. False when the device is not as it should be.
  bool boot();
  // One control command: the bytes of the answer; nullopt when none came.
  std::optional<std::vector<std::byte>> execute(const wire::RequestBytes& request,
                                                uint32_t response_space = 24);
  // The same: the type of the answer, 0 when none came.
  uint32_t run(const wire::RequestBytes& request);
  void ring_control() { driver_.notify(0); }

  uint32_t create(uint32_t id);
  uint32_t attach(uint32_t id, const std::vector<wire::WireEntry>& entries);
  uint32_t attach_picture(uint32_t id) { return attach(id, {{kPictures, kPictureBytes}}); }
  uint32_t transfer(uint32_t id);
  uint32_t set_scanout(uint32_t id);
  uint32_t flush(uint32_t id);
  uint32_t detach(uint32_t id);
  uint32_t unref(uint32_t id);
  bool move_cursor(uint32_t x, uint32_t y);

  // Fills the picture at the start of the picture memory.
  void paint(uint32_t seed);
  // create, attach, scanout, and `frames` times paint, transfer, flush; true when all went well.
  bool draw(uint32_t id, uint32_t frames);

  GuestRam& ram() { return ram_; }
  GuestMemory& memory() { return memory_; }
  VirtqueueDriver& control() { return control_; }
  VirtioPciDriver& driver() { return driver_; }

 private:
  Result<void> Map(uint64_t iova, uint64_t size, bool with_file);
  static constexpr wire::WireRect kWhole{0, 0, kWidth, kHeight};

  GuestRam ram_{kLowSize + kPicturesSize};
  GuestMemory memory_{&ram_, kRam};
  VirtqueueDriver control_{&memory_, 64};
  VirtqueueDriver cursor_{&memory_, 16};
  bool low_has_file_ = true;
  bool pictures_have_file_ = true;
  glue::VfioDevice& device_;
  VirtioPciDriver driver_;
  const std::function<bool()> wait_;
};

}  // namespace mvgpu::testing
