#include "apionly-domain/pin/pin_backend.h"

namespace mvgpu::domain {

namespace {

class NonePinBackend final : public PinBackend {
 public:
  std::string_view name() const override { return "none"; }
  Result<void> pin(const GuestFile&, PageRun) override { return {}; }
  void unpin(const GuestFile&, PageRun) override {}
  uint64_t locked_pages() const override { return 0; }
  uint32_t granule_pages(const GuestFile&) const override { return 1; }
};

}  // namespace

std::unique_ptr<PinBackend> MakeNonePinBackend() { return std::make_unique<NonePinBackend>(); }

}  // namespace mvgpu::domain
