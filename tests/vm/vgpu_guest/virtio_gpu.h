#pragma once

#include <stdint.h>

#include "tests/vm/vgpu_guest/ports.h"

namespace mvgpu::bare {

// A driver of virtio-gpu (virtio 1.2, 4.1 and 5.7) that knows one queue, one request at a time and
// one resource, waits by looking, and has all of its memory at fixed addresses.
class VirtioGpu {
 public:
  // False: the device is no virtio-gpu of virtio 1, or refuses.
  bool start(const PciSlot& slot);

  // A resource of 640x480 pixels on the scanout, without memory. False: the device refused.
  bool create_picture();
  // Gives it kPicturePages at kPicture, shows what is there; takes them away. False: refused.
  bool attach();
  bool show();
  bool detach();

  static constexpr uint32_t kPicture = 0x1000000;  // guest-physical
  static constexpr uint32_t kPicturePages = 640 * 480 * 4 / 4096;

 private:
  struct Place {  // of a structure in a BAR
    volatile uint8_t* base = nullptr;
    uint32_t multiplier = 0;
  };
  static Place Find(const PciSlot& slot, uint8_t type);
  bool SetUpQueue();
  // Sends the request, and waits for OK_NODATA.
  template <typename Request>
  bool Ask(const Request& request);
  bool Send(uint32_t size);

  Place common_;
  Place notify_;
  volatile uint16_t* doorbell_ = nullptr;
  uint16_t sent_ = 0;
};

}  // namespace mvgpu::bare
