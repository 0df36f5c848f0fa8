#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>

#include "dma-cache/dma_cache.h"
#include "dma-cache/vulkan/vulkan_mapper.h"
#include "tests/fakes/dma_party.h"
#include "tests/fakes/fake_vulkan_device.h"
#include "tests/fakes/guest_ram.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::dma {

inline constexpr uint64_t kPiecePages = 16;
inline constexpr uint64_t kPieces = 40;  // in guest memory

// Guest memory in one mapping, and a cache with a mapper over a table of Vulkan functions that are
// watched and made to fail.
class VulkanMapperTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto domain = domain::ApiOnlyDomain::Create({}, domain::MakeNonePinBackend(), nullptr, nullptr);
    ASSERT_THAT(domain, testing::IsOk());
    domain_ = std::move(*domain);
    ASSERT_THAT(container_.attach(domain_.get()), testing::IsOk());
    ASSERT_THAT(container_.map(ram_.map_request(0, 0, ram_.size())), testing::IsOk());
    // Pieces are aligned in host memory, wherever the kernel put the guest's.
    const domain::ApiOnlyDomain::Translator translator(*domain_);
    host_ = reinterpret_cast<uint64_t>(translator.translate(Iova(0), domain::Access::kRead));
    first_ = PagesIn(-host_ & (BytesIn(kPiecePages) - 1));
    Open({});
  }
  void TearDown() override {
    user_.reset();
    cache_.reset();
    mapper_.reset();
    EXPECT_TRUE(device_.is_empty());
    ASSERT_THAT(container_.detach(domain_.get()), testing::IsOk());
  }

  void Open(ImportLimits limits, bool knows_mappings = true) {
    user_.reset();
    cache_.reset();
    VulkanMapper::Options options;
    options.piece_bytes = BytesIn(kPiecePages);
    if (knows_mappings) options.mapping_at = [this](Iova at) { return container_.mapping_at(at); };
    mapper_.emplace(device_.target(limits), options);
    cache_.emplace(domain_.get(), &*mapper_);
    user_.emplace(&*cache_);
  }

  // The n-th page of a piece, as the number of its IOVA page.
  uint64_t PageOf(uint64_t piece, uint64_t page) const {
    return first_ + piece * kPiecePages + page;
  }
  Result<DmaMapping> Use(uint64_t first, uint64_t count) {
    return (*user_)->map(testing::MakeRange(BytesIn(first), BytesIn(count)), Direction::kToDevice);
  }
  domain::PinnedRun RunOf(uint64_t first, uint64_t count) const {
    return {testing::MakeRange(BytesIn(first), BytesIn(count)),
            reinterpret_cast<std::byte*>(host_ + BytesIn(first))};
  }
  uint64_t Figure(std::string_view name) const {
    for (const auto& [figure, value] : mapper_->figures())
      if (figure == name) return value;
    ADD_FAILURE() << "no figure " << name;
    return 0;
  }
  // Whether the device reaches this page of guest memory.
  bool IsImported(uint64_t page) const {
    const uint64_t host = host_ + BytesIn(page);
    for (const auto& [handle, memory] : device_.memories)
      if (host - memory.host < memory.size) return true;
    return false;
  }
  void ExpectMapped(const DmaMapping& use) {
    for (const MappedRun& run : use.runs()) {
      for (uint64_t at = 0; at < run.iova.size(); at += kPageSize) {
        EXPECT_EQ(device_.at(run.address + at),
                  reinterpret_cast<std::byte*>(host_ + (run.iova.start().value() + at)));
      }
    }
  }

  testing::GuestRam ram_{BytesIn(kPiecePages) * kPieces};
  domain::Container container_;
  std::unique_ptr<domain::ApiOnlyDomain> domain_;
  uint64_t host_ = 0;   // of IOVA 0
  uint64_t first_ = 0;  // page of the first whole piece
  testing::FakeVulkanDevice device_;
  std::optional<VulkanMapper> mapper_;
  std::optional<DmaCache> cache_;
  std::optional<testing::DmaParty> user_;
};

}  // namespace mvgpu::dma
