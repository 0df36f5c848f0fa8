#include <memory>
#include <utility>
#include <vector>

#include <absl/container/flat_hash_map.h>

#include "backend/policies/pinning_policy.h"
#include "backend/policies/shown_pages.h"

namespace mvgpu::backend {

namespace {

// Each map of the guest's IOMMU driver is told to the host, which pins and maps; so is each unmap.
class MapUnmapPolicy final : public PinningPolicy {
 public:
  explicit MapUnmapPolicy(PolicyGuest* guest)
      : guest_(*guest), context_(guest->domain().open_context(guest)), shown_(&guest->space()) {}
  ~MapUnmapPolicy() override {
    while (!held_.empty()) LetGo(held_.begin()->first);
  }

  Result<void> map(uint32_t id, const DmaBuffer& buffer) override {
    ++notifications_;
    std::vector<domain::PinnedRange>& held = held_[id];
    for (const PageRun& part : buffer.parts) {
      MVGPU_ASSIGN_OR_RETURN(domain::PinnedRange pinned,
                             context_->pin(RangeOf(part), AccessFor(buffer.direction)));
      MVGPU_RETURN_IF_ERROR(Show(pinned));
      held.push_back(std::move(pinned));
    }
    return {};
  }
  Result<void> unmap(uint32_t id, const DmaBuffer&) override {
    ++notifications_;
    LetGo(id);
    return {};
  }
  std::byte* reach(Iova page, domain::Access access) override {
    return guest_.iommu().translate(page, access);
  }
  uint64_t notifications() const override { return notifications_; }

 private:
  Result<void> Show(const domain::PinnedRange& pinned) {
    const auto runs = pinned.runs();
    for (size_t i = 0; i < runs.size(); ++i) {
      auto shown = shown_.add(runs[i]);
      if (shown) continue;
      for (size_t done = 0; done < i; ++done) shown_.remove(PagesOf(runs[done].iova));
      return shown;
    }
    return {};
  }
  void LetGo(uint32_t id) {
    const auto found = held_.find(id);
    for (const domain::PinnedRange& pinned : found->second) {
      for (const domain::PinnedRun& run : pinned.runs()) shown_.remove(PagesOf(run.iova));
    }
    held_.erase(found);
  }

  PolicyGuest& guest_;  // outlives this: contract of MakePolicy()
  const std::unique_ptr<domain::PinContext> context_;
  ShownPages shown_;
  absl::flat_hash_map<uint32_t, std::vector<domain::PinnedRange>> held_;  // of the context
  uint64_t notifications_ = 0;
};

}  // namespace

std::unique_ptr<PinningPolicy> MakeMapUnmapPolicy(PolicyGuest* guest) {
  return std::make_unique<MapUnmapPolicy>(guest);
}

}  // namespace mvgpu::backend
