#pragma once

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include <absl/container/flat_hash_map.h>

#include "apionly-domain/pin/pin_backend.h"

namespace mvgpu::backend {

// What a pin back end is asked to do, over the time of a trace: the one place where every policy is
// measured alike.
struct PinFigures {
  uint64_t pin_calls = 0;  // runs that were pinned, each one call of the kernel or two
  uint64_t unpin_calls = 0;
  uint64_t pages_pinned = 0;    // by these calls
  uint64_t repinned_pages = 0;  // of them, pages that had been pinned and let go before
  uint64_t pinned_pages = 0;    // now
  uint64_t peak_pages = 0;
  double page_ns = 0;  // pinned pages times how long they were, up to the last set_time()
};

// Passes everything on and counts it. Not thread-safe, as any back end.
class CountingPinBackend final : public domain::PinBackend {
 public:
  // `figures` outlives the back end.
  CountingPinBackend(std::unique_ptr<domain::PinBackend> inner, PinFigures* figures)
      : inner_(std::move(inner)), figures_(*figures) {}

  // What happens from now on happens at this time of the trace.
  void set_time(uint64_t now_ns);

  std::string_view name() const override { return inner_->name(); }
  Result<void> pin(const domain::GuestFile& file, PageRun pages) override;
  void unpin(const domain::GuestFile& file, PageRun pages) override;
  uint64_t locked_pages() const override { return inner_->locked_pages(); }
  uint32_t granule_pages(const domain::GuestFile& file) const override {
    return inner_->granule_pages(file);
  }
  uint64_t areas() const override { return inner_->areas(); }
  uint64_t area_budget() const override { return inner_->area_budget(); }

 private:
  const std::unique_ptr<domain::PinBackend> inner_;
  PinFigures& figures_;
  uint64_t now_ns_ = 0;
  // Which pages were ever pinned, a bit each.
  absl::flat_hash_map<domain::FileIdentity, std::vector<bool>> seen_;
};

}  // namespace mvgpu::backend
