// What the mapper imports when. That imported memory is what a device works on, lavapipe_test.cc
// shows.

#include "dma-cache/vulkan/vulkan_mapper.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <thread>
#include <utility>
#include <vector>

#include "tests/dma-cache/vulkan/vulkan_mapper_fixture.h"
#include "tests/fakes/guest_ram.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::dma {
namespace {

using testing::GuestRam;
using testing::IsOk;
using testing::MakeRange;

TEST_F(VulkanMapperTest, PagesOfOnePieceAreOneImportAndTheOthersCostNoVulkanCall) {
  const auto first = Use(PageOf(1, 3), 1);
  ASSERT_THAT(first, IsOk());
  const uint64_t calls = device_.calls;
  EXPECT_GT(calls, 0u);
  EXPECT_EQ(Figure("vulkan_calls"), calls);
  std::vector<DmaMapping> uses;
  for (const uint64_t page : {4u, 0u, 15u, 9u}) {
    auto use = Use(PageOf(1, page), 1);
    ASSERT_THAT(use, IsOk());
    ExpectMapped(*use);
    uses.push_back(std::move(*use));
  }
  EXPECT_EQ(device_.calls, calls);
  EXPECT_EQ(Figure("vulkan_calls"), calls);
  EXPECT_EQ(Figure("imports"), 1u);
  EXPECT_EQ(Figure("pieces"), 1u);
  EXPECT_EQ(Figure("import_bytes"), BytesIn(kPiecePages));
  EXPECT_EQ(Figure("mapped_pages"), 5u);
}

TEST_F(VulkanMapperTest, ThePieceGoesWithTheLastOfItsPagesInWhateverOrder) {
  for (const bool backwards : {false, true}) {
    std::vector<DmaMapping> uses;
    for (const uint64_t page : {2u, 7u, 11u}) uses.push_back(*Use(PageOf(2, page), 2));
    if (backwards) std::swap(uses.front(), uses.back());
    uses[0].reset();
    uses[1].reset();
    EXPECT_EQ(device_.memories.size(), 1u);
    EXPECT_EQ(Figure("mapped_pages"), 2u);
    uses[2].reset();
    EXPECT_TRUE(device_.is_empty());
    EXPECT_EQ(Figure("import_bytes"), 0u);
  }
  EXPECT_EQ(Figure("vulkan_calls"), device_.calls) << "those that take pieces away count, too";
}

TEST_F(VulkanMapperTest, ARunThatCrossesPiecesIsMappedWhole) {
  auto use = Use(PageOf(1, 10), 2 * kPiecePages);
  ASSERT_THAT(use, IsOk());
  ASSERT_EQ(use->runs().size(), 3u) << "three pieces with addresses of their own";
  EXPECT_EQ(use->runs()[0].iova, MakeRange(BytesIn(PageOf(1, 10)), BytesIn(6)));
  EXPECT_EQ(use->runs()[2].iova, MakeRange(BytesIn(PageOf(3, 0)), BytesIn(10)));
  ExpectMapped(*use);
  EXPECT_EQ(device_.memories.size(), 3u);
}

TEST_F(VulkanMapperTest, PiecesWithAddressesInARowAreOneRunThatMayBeUnmappedInAnyCut) {
  device_.address_gap = 0;
  std::vector<MappedRun> mapped;
  const domain::PinnedRun run = RunOf(PageOf(1, 10), 2 * kPiecePages);
  ASSERT_THAT(mapper_->map({&run, 1}, domain::Access::kReadWrite, &mapped), IsOk());
  ASSERT_EQ(mapped.size(), 1u);
  EXPECT_EQ(mapped[0].iova, run.iova);
  // 6 pages, 16 and 10, cut after 3 and 24 pages.
  mapper_->unmap(mapped[0].address + BytesIn(3), BytesIn(21));
  mapper_->flush();
  EXPECT_EQ(device_.memories.size(), 2u) << "the piece in the middle has gone";
  mapper_->unmap(mapped[0].address, BytesIn(3));
  mapper_->unmap(mapped[0].address + BytesIn(24), BytesIn(8));
  mapper_->flush();
  EXPECT_TRUE(device_.is_empty());
}

TEST_F(VulkanMapperTest, ScatteredRunsOfOneCallShareTheirPieces) {
  std::vector<domain::PinnedRun> runs;
  for (const uint64_t page : {9u, 2u, 5u}) runs.push_back(RunOf(PageOf(4, page), 1));
  runs.push_back(RunOf(PageOf(7, 0), 3));
  const MappedRun other{MakeRange(BytesIn(PageOf(4, 8)), kPageSize), DmaAddr(0x1000)};
  std::vector<MappedRun> mapped = {other};
  ASSERT_THAT(mapper_->map(runs, domain::Access::kReadWrite, &mapped), IsOk());
  ASSERT_EQ(mapped.size(), 1 + runs.size());
  EXPECT_EQ(mapped[0], other);
  for (size_t i = 0; i < runs.size(); ++i) {
    EXPECT_EQ(mapped[i + 1].iova, runs[i].iova);
    EXPECT_EQ(device_.at(mapped[i + 1].address), runs[i].host);
  }
  EXPECT_EQ(Figure("imports"), 2u);
  for (size_t i = 0; i < runs.size(); ++i)
    mapper_->unmap(mapped[i + 1].address, runs[i].iova.size());
  mapper_->flush();
}

TEST_F(VulkanMapperTest, WhatTwoCallsMappedStaysTwoRuns) {
  std::vector<MappedRun> mapped;
  for (const uint64_t page : {0u, 1u}) {
    const domain::PinnedRun run = RunOf(PageOf(1, page), 1);
    ASSERT_THAT(mapper_->map({&run, 1}, domain::Access::kReadWrite, &mapped), IsOk());
  }
  ASSERT_EQ(mapped.size(), 2u);
  EXPECT_EQ(mapped[0].address + kPageSize, mapped[1].address);
  for (const MappedRun& run : mapped) {
    EXPECT_EQ(run.iova.size(), kPageSize);
    mapper_->unmap(run.address, kPageSize);
  }
  mapper_->flush();
}

TEST_F(VulkanMapperTest, APieceIsTakenUpAgainUntilTheFlush) {
  const domain::PinnedRun run = RunOf(PageOf(1, 0), 1);
  std::vector<MappedRun> mapped;
  for (int i = 0; i < 3; ++i) {
    mapped.clear();
    ASSERT_THAT(mapper_->map({&run, 1}, domain::Access::kReadWrite, &mapped), IsOk());
    mapper_->unmap(mapped[0].address, kPageSize);
  }
  EXPECT_EQ(Figure("imports"), 1u);
  mapper_->flush();
  EXPECT_TRUE(device_.is_empty());
  ASSERT_THAT(mapper_->map({&run, 1}, domain::Access::kReadWrite, &mapped), IsOk());
  mapper_->flush();
  EXPECT_EQ(device_.memories.size(), 1u) << "a flush takes nothing that is mapped";
  mapper_->unmap(mapped[1].address, kPageSize);
  mapper_->flush();
}

TEST_F(VulkanMapperTest, APieceNeverReachesBeyondOneMappingAndGoesWithIt) {
  GuestRam other(BytesIn(4 * kPiecePages));
  const uint64_t base = PagesIn(uint64_t{1} << 32);
  // Three mappings of one file, one after the other.
  for (const uint64_t page : {0u, 5u, 10u}) {
    ASSERT_THAT(container_.map(other.map_request(BytesIn(base + page), BytesIn(page), BytesIn(5))),
                IsOk());
  }
  auto all = Use(base, 15);
  ASSERT_THAT(all, IsOk());
  uint64_t bytes = 0;
  for (const auto& [handle, memory] : device_.memories) {
    EXPECT_LE(memory.size, BytesIn(5));
    bytes += memory.size;
  }
  EXPECT_EQ(bytes, BytesIn(15));
  ASSERT_THAT(container_.unmap(Iova(BytesIn(base + 5)), BytesIn(5)), IsOk());
  bytes = 0;
  for (const auto& [handle, memory] : device_.memories) bytes += memory.size;
  EXPECT_EQ(bytes, BytesIn(10)) << "nothing of what was revoked is imported";
  EXPECT_FALSE(all->is_valid());
  ASSERT_THAT(container_.unmap(Iova(BytesIn(base)), BytesIn(15)), IsOk());
  EXPECT_TRUE(device_.is_empty()) << "before the memory behind it goes";
}

TEST_F(VulkanMapperTest, ACutLeavesThePieceToThePagesThatAreLeft) {
  auto kept = Use(PageOf(1, 2), 2);
  auto cut = Use(PageOf(1, 8), 2);
  ASSERT_THAT(
      container_.unmap(Iova(BytesIn(PageOf(1, 8))), BytesIn(8), domain::Container::Cut::kSplit),
      IsOk());
  EXPECT_FALSE(cut->is_valid());
  EXPECT_TRUE(kept->is_valid());
  ExpectMapped(*kept);
  kept->reset();
  EXPECT_TRUE(device_.is_empty());
  // From now on what is left of the mapping is the limit.
  auto again = Use(PageOf(1, 2), 2);
  EXPECT_TRUE(IsImported(PageOf(1, 7)));
  EXPECT_FALSE(IsImported(PageOf(1, 8)));
}

TEST_F(VulkanMapperTest, MemoryThatIsMappedTwiceIsImportedOnce) {
  const uint64_t base = PagesIn(uint64_t{1} << 32);
  const uint64_t page = PageOf(2, 4);
  // The same memory again, from the middle of a piece to the middle of the next one.
  ASSERT_THAT(container_.map(ram_.map_request(BytesIn(base), BytesIn(page), BytesIn(kPiecePages))),
              IsOk());
  auto second = Use(base + 6, 1);
  ASSERT_THAT(second, IsOk());
  EXPECT_FALSE(IsImported(page - 1)) << "beyond the mapping";
  auto first = Use(page + 6, 1);
  ASSERT_THAT(first, IsOk());
  EXPECT_EQ(first->runs()[0].address, second->runs()[0].address);
  auto before = Use(page - 1, 2);  // before the piece that is there, and in it
  ASSERT_THAT(before, IsOk());
  ExpectMapped(*before);
  EXPECT_EQ(Figure("pieces"), 2u);
  ASSERT_THAT(container_.unmap(Iova(BytesIn(base)), BytesIn(kPiecePages)), IsOk());
  EXPECT_TRUE(first->is_valid());
  ExpectMapped(*first);
}

TEST_F(VulkanMapperTest, WithoutKnowledgeOfMappingsExactlyTheRunsAreImported) {
  Open({}, /*knows_mappings=*/false);
  auto use = Use(PageOf(1, 3), 2);
  ASSERT_THAT(use, IsOk());
  EXPECT_EQ(Figure("import_bytes"), BytesIn(2));
  auto rest = Use(PageOf(1, 2), 5);
  ASSERT_THAT(rest, IsOk());
  ExpectMapped(*rest);
  EXPECT_EQ(Figure("import_bytes"), BytesIn(5));
}

TEST_F(VulkanMapperTest, ThreadsMapAndUnmapWhileFiguresAreRead) {
  std::atomic<bool> done = false;
  std::thread reader([&] {
    while (!done) EXPECT_LE(Figure("pieces"), kPieces + 1);
  });
  std::vector<std::thread> threads;
  for (uint64_t t = 0; t < 3; ++t) {
    threads.emplace_back([this, t] {
      for (uint64_t i = 0; i < 300; ++i) {
        std::vector<MappedRun> mapped;
        const domain::PinnedRun run = RunOf((7 * i + t) % (kPiecePages * (kPieces - 2)), 20);
        ASSERT_THAT(mapper_->map({&run, 1}, domain::Access::kReadWrite, &mapped), IsOk());
        for (const MappedRun& part : mapped) mapper_->unmap(part.address, part.iova.size());
        if (i % 3 == 0) mapper_->flush();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  done = true;
  reader.join();
  mapper_->flush();
  EXPECT_EQ(Figure("pieces"), 0u);
}

}  // namespace
}  // namespace mvgpu::dma
