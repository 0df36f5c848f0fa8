#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "dma-cache/dma_cache.h"
#include "tests/fakes/counting_mapper.h"
#include "tests/fakes/dma_party.h"
#include "tests/fakes/fake_pin_backend.h"
#include "tests/fakes/guest_ram.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::dma::testing {

using mvgpu::testing::CountingMapper;
using Party = mvgpu::testing::DmaParty;
using mvgpu::testing::FailsWith;
using mvgpu::testing::FakePinBackend;
using mvgpu::testing::GuestRam;
using mvgpu::testing::IsOk;
using mvgpu::testing::MakeRange;

// 128 pages of RAM at IOVA 0, of 1024; a cache with one user.
class DmaCacheFixture : public ::testing::Test {
 protected:
  explicit DmaCacheFixture(uint64_t idle_limit_pages = 0, uint64_t pin_limit_pages = UINT64_MAX)
      : idle_limit_pages_(idle_limit_pages), pin_limit_pages_(pin_limit_pages) {}

  void SetUp() override {
    domain::ApiOnlyDomain::Options options;
    options.pin_limit_pages = pin_limit_pages_;
    auto domain = domain::ApiOnlyDomain::Create(options, std::make_unique<FakePinBackend>(pins_),
                                                nullptr, nullptr);
    ASSERT_THAT(domain, IsOk());
    domain_ = std::move(*domain);
    ASSERT_THAT(container_.attach(domain_.get()), IsOk());
    ASSERT_THAT(MapRam(0, 0, 128), IsOk());
    cache_.emplace(domain_.get(), &mapper_, DmaCache::Options{idle_limit_pages_});
    user_.emplace(&*cache_);
  }
  void TearDown() override {
    user_.reset();
    cache_.reset();
    EXPECT_EQ(mapper_.mapped_pages(), 0u);
    EXPECT_TRUE(pins_->pages.empty());
    ASSERT_THAT(container_.detach(domain_.get()), IsOk());
  }

  Result<void> MapRam(uint64_t iova_page, uint64_t file_page, uint64_t pages,
                      domain::Access access = domain::Access::kReadWrite) {
    return container_.map(
        ram_.map_request(BytesIn(iova_page), BytesIn(file_page), BytesIn(pages), access));
  }
  // Every page a mapping of its own, in reverse order in the file: no two of them contiguous.
  void MapScattered(uint64_t iova_page, uint64_t pages) {
    for (uint64_t i = 0; i < pages; ++i) {
      ASSERT_THAT(MapRam(iova_page + i, pages - 1 - i, 1), IsOk());
    }
  }
  void UnmapRam(uint64_t iova_page, uint64_t pages) {
    ASSERT_THAT(container_.unmap(Iova(BytesIn(iova_page)), BytesIn(pages)), IsOk());
  }
  Result<DmaMapping> Use(uint64_t page, uint64_t count,
                         Direction direction = Direction::kToDevice) {
    return (*user_)->map(MakeRange(BytesIn(page), BytesIn(count)), direction);
  }
  Result<DmaMapping> UseContiguous(uint64_t page, uint64_t count) {
    return (*user_)->map_contiguous(MakeRange(BytesIn(page), BytesIn(count)), Direction::kToDevice);
  }
  Result<DmaMapping> UseBy(Party& party, uint64_t page, uint64_t count,
                           Direction direction = Direction::kToDevice) {
    return party->map(MakeRange(BytesIn(page), BytesIn(count)), direction);
  }
  // Addresses of single pages, held without a handle.
  struct Loose {
    std::vector<Iova> pages;
    std::vector<DmaAddr> addresses;
    uint64_t epoch = 0;
  };
  Result<Loose> UsePages(const std::vector<uint64_t>& pages,
                         Direction direction = Direction::kToDevice) {
    Loose loose;
    for (const uint64_t page : pages) loose.pages.emplace_back(BytesIn(page));
    loose.addresses.resize(pages.size());
    MVGPU_ASSIGN_OR_RETURN(loose.epoch,
                           (*user_)->map_pages(loose.pages, direction, loose.addresses));
    return loose;
  }
  Result<void> Release(const Loose& loose, Direction direction = Direction::kToDevice) {
    return (*user_)->unmap_pages(loose.pages, direction, loose.epoch);
  }
  // Every page of every run has the address that the mapper gave for it.
  void ExpectTrueAddresses(const DmaMapping& mapping) {
    for (const MappedRun& run : mapping.runs()) {
      for (uint64_t i = 0; i < PagesIn(run.iova.size()); ++i) {
        EXPECT_EQ(mapper_.iova_page_at(run.address + BytesIn(i)), run.iova.start().page() + i);
      }
    }
  }
  uint64_t UniquePins() const { return domain_->counters().unique_pages; }
  DmaCache::Counters Now() const { return cache_->counters(); }
  // Pages of [0, 64) that the dirty log reports now, as bits.
  uint64_t DirtyPages() {
    uint64_t bits = 0;
    EXPECT_THAT(domain_->read_dirty(MakeRange(0, BytesIn(64)), kPageSize,
                                    domain::DirtyLog::Read::kClear, {&bits, 1}),
                IsOk());
    return bits;
  }

  const uint64_t idle_limit_pages_;
  const uint64_t pin_limit_pages_;
  GuestRam ram_{1024 * kPageSize};
  std::shared_ptr<FakePinBackend::State> pins_ = std::make_shared<FakePinBackend::State>();
  domain::Container container_;
  std::unique_ptr<domain::ApiOnlyDomain> domain_;
  CountingMapper mapper_;
  std::optional<DmaCache> cache_;
  std::optional<Party> user_;
};

}  // namespace mvgpu::dma::testing
