#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "apionly-domain/base/error.h"
#include "apionly-domain/base/mutex.h"
#include "gpu-model/display/display.h"

namespace mvgpu::gpu {

// Keeps a copy of what each scanout shows, to be saved as a picture at any time. A scanout that was
// switched off keeps the last picture it showed: guests switch off when they end, and what they
// drew before is what a screenshot of the end is for.
//
// Thread-safe: the device's thread brings frames, any other saves them.
class Screenshot final : public Display {
 public:
  void on_frame(uint32_t scanout, const FrameView& frame, const Rect& damage) override;
  void on_disabled(uint32_t) override {}

  // Errors: kInvalid when the scanout has never shown anything, and those of WritePng(). Not called
  // on a path where the device waits: encoding takes tens of milliseconds, without the lock.
  Result<void> save_png(const std::string& path, uint32_t scanout = 0) const;
  // FrameHash() of the picture; nullopt when the scanout has never shown anything.
  std::optional<uint64_t> hash(uint32_t scanout) const;
  // One of its pixels, 0xXXRRGGBB; nullopt when there is none.
  std::optional<uint32_t> pixel(uint32_t scanout, uint32_t x, uint32_t y) const;

 private:
  struct Picture {
    Size size;
    std::vector<std::byte> pixels;  // without padding between lines

    FrameView view() const { return {size, size.width * 4, pixels}; }
  };

  mutable Mutex mutex_;
  std::map<uint32_t, Picture> pictures_ ABSL_GUARDED_BY(mutex_);  // by scanout; the last one shown
};

}  // namespace mvgpu::gpu
