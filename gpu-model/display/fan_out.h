#pragma once

#include <utility>
#include <vector>

#include "gpu-model/display/display.h"

namespace mvgpu::gpu {

// Hands every picture on to several displays, in the order in which they were given.
class FanOut final : public Display {
 public:
  // The displays outlive this one.
  explicit FanOut(std::vector<Display*> displays) : displays_(std::move(displays)) {}

  void on_frame(uint32_t scanout, const FrameView& frame, const Rect& damage) override {
    for (Display* display : displays_) display->on_frame(scanout, frame, damage);
  }
  void on_disabled(uint32_t scanout) override {
    for (Display* display : displays_) display->on_disabled(scanout);
  }

 private:
  const std::vector<Display*> displays_;
};

}  // namespace mvgpu::gpu
