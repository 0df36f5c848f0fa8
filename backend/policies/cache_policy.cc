#include <bit>
#include <memory>
#include <utility>
#include <vector>

#include <absl/container/flat_hash_map.h>

#include "apionly-domain/base/check.h"
#include "backend/policies/pinning_policy.h"
#include "dma-cache/dma_cache.h"
#include "dma-cache/iommu_mapper.h"

namespace mvgpu::backend {

namespace {

// Ours: buffers are held in the cache of device addresses as long as they are mapped; what nobody
// holds stays as long as the idle list has room. Idle pages are of use to whoever maps them next,
// so a miss may bring more than it needs.
class CachePolicy final : public PinningPolicy, private dma::DmaUser::Owner {
 public:
  CachePolicy(PolicyGuest* guest, CachePolicyOptions options)
      : guest_(*guest),
        options_(options),
        mapper_(&guest->space()),
        cache_(&guest->domain(), &mapper_, {.idle_limit_pages = options.idle_pages}),
        user_(cache_.open_user(this)) {
    MVGPU_CHECK(options_.ahead_pages == 0 || std::has_single_bit(options_.ahead_pages));
  }

  Result<void> map(uint32_t id, const DmaBuffer& buffer) override {
    const uint64_t pins = guest_.pins().pin_calls;
    std::vector<dma::DmaMapping>& held = held_[id];
    for (const PageRun& part : buffer.parts) {
      if (options_.ahead_pages != 0) BringAround(part);
      MVGPU_ASSIGN_OR_RETURN(dma::DmaMapping mapping, user_->map(RangeOf(part), buffer.direction));
      held.push_back(std::move(mapping));
    }
    if (guest_.pins().pin_calls != pins) ++notifications_;
    return {};
  }
  Result<void> unmap(uint32_t id, const DmaBuffer&) override {
    held_.erase(id);
    return {};
  }
  std::byte* reach(Iova page, domain::Access access) override {
    const auto address = cache_.address_of(page);
    return address ? guest_.iommu().translate(Iova(address->value()), access) : nullptr;
  }
  uint64_t notifications() const override { return notifications_; }

 private:
  void on_revoke(IovaRange) override {}  // nobody takes this memory away

  // Where an end of the part is not cached, makes all of the aligned window around it idle pages. A
  // window that cannot be had is not missed.
  void BringAround(PageRun part) {
    for (const uint64_t page : {part.first, part.end() - 1}) {
      const Iova iova(BytesIn(page));
      if (cache_.address_of(iova)) continue;
      const uint64_t first = page - page % options_.ahead_pages;
      const auto window =
          RangeOf({first, options_.ahead_pages}).intersection(guest_.memory_around(iova));
      // For reading: an idle page is pinned in no other way.
      static_cast<void>(user_->map(*window, dma::Direction::kToDevice));
    }
  }

  PolicyGuest& guest_;  // outlives this: contract of MakePolicy()
  const CachePolicyOptions options_;
  dma::IommuMapper mapper_;
  dma::DmaCache cache_;
  const std::unique_ptr<dma::DmaUser> user_;
  absl::flat_hash_map<uint32_t, std::vector<dma::DmaMapping>> held_;  // of the user: goes first
  uint64_t notifications_ = 0;
};

}  // namespace

std::unique_ptr<PinningPolicy> MakeCachePolicy(PolicyGuest* guest, CachePolicyOptions options) {
  return std::make_unique<CachePolicy>(guest, options);
}

}  // namespace mvgpu::backend
