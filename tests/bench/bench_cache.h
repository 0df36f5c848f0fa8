#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "dma-cache/dma_cache.h"
#include "tests/bench/bench_guest.h"
#include "tests/bench/harness.h"
#include "tests/bench/page_slices.h"

namespace mvgpu::bench {

// A device that sees no two pages side by side: frames are those of the guest, in another order.
class ScatteringMapper final : public dma::Mapper {
 public:
  // `pages` is a power of two, and all pages lie below.
  explicit ScatteringMapper(uint64_t pages) : mask_(pages - 1) {}
  std::string_view name() const override { return "scattering"; }
  Result<void> map(std::span<const domain::PinnedRun> runs, domain::Access,
                   std::vector<dma::MappedRun>* mapped) override {
    for (const domain::PinnedRun& run : runs) {
      const PageRun pages = run.iova_pages();
      for (uint64_t page = pages.first; page < pages.end(); ++page) {
        mapped->push_back({RangeOf({page, 1}), AddressOf(page)});
      }
    }
    return {};
  }
  Result<void> map_apart(std::span<const domain::PinnedRun> runs, domain::Access access,
                         std::vector<dma::MappedRun>* mapped) override {
    return map(runs, access, mapped);
  }
  void unmap(DmaAddr, uint64_t) override {}
  DmaAddr AddressOf(uint64_t page) const {
    return DmaAddr(BytesIn((page * 0x9e3779b97f4a7c15u) & mask_));
  }

 private:
  const uint64_t mask_;
};

// A guest, a cache over it, and users that hold all of its memory, page by page.
class CachedGuest final : public dma::DmaUser::Owner {
 public:
  enum class Device : uint8_t { kLinear, kScattered };

  CachedGuest(const Settings& settings, Device device, size_t users)
      : guest_(Layout::OneMapping(settings.memory), domain::MakeNonePinBackend()),
        mapper_(device == Device::kLinear
                    ? dma::MakeNoneMapper()
                    : std::make_unique<ScatteringMapper>(PagesIn(settings.memory))),
        cache_(&guest_.domain(), mapper_.get()) {
    if (device == Device::kLinear) {
      keeper_user_ = cache_.open_user(this);
      keeper_ = *keeper_user_->map(*IovaRange::FromStartAndSize(Iova(0), settings.memory),
                                   dma::Direction::kBidirectional);
    }
    for (size_t i = 0; i < users; ++i) HoldAll(cache_.open_user(this));
  }
  ~CachedGuest() override {
    for (const auto& user : users_) {
      ForAll([&](std::span<const Iova> batch) {
        MVGPU_CHECK(user->unmap_pages(batch, dma::Direction::kBidirectional, 0).has_value());
      });
    }
  }
  void on_revoke(IovaRange) override {}

  Guest& guest() { return guest_; }
  dma::DmaCache& cache() { return cache_; }
  dma::DmaUser& user(size_t i = 0) { return *users_[i]; }

 private:
  template <typename Visit>
  void ForAll(const Visit& visit) {
    const GuestPages pages = guest_.pages();
    std::array<Iova, kBatch> batch;
    for (uint64_t page = 0; page < pages.count(); page += kBatch) {
      for (size_t i = 0; i < kBatch; ++i) batch[i] = pages.iova(page + i);
      visit(std::span<const Iova>(batch));
    }
  }
  void HoldAll(std::unique_ptr<dma::DmaUser> user) {
    ForAll([&](std::span<const Iova> batch) {
      std::array<DmaAddr, kBatch> addresses;
      MVGPU_CHECK(user->map_pages(batch, dma::Direction::kBidirectional, addresses).has_value());
    });
    users_.push_back(std::move(user));
  }

  Guest guest_;
  const std::unique_ptr<dma::Mapper> mapper_;
  dma::DmaCache cache_;
  std::unique_ptr<dma::DmaUser> keeper_user_;
  dma::DmaMapping keeper_;  // of all memory, so that it is one run
  std::vector<std::unique_ptr<dma::DmaUser>> users_;
};

}  // namespace mvgpu::bench
