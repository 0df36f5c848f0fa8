// What the mapper does where a driver fails, has limits or has rules of its own.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

#include "tests/dma-cache/vulkan/vulkan_mapper_fixture.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::dma {
namespace {

using testing::FailsWith;
using ::testing::HasSubstr;
using testing::IsOk;

TEST_F(VulkanMapperTest, AFailureAtAnyCallLeavesNothing) {
  for (const VkResult failure : {VK_ERROR_OUT_OF_DEVICE_MEMORY, VK_ERROR_DEVICE_LOST}) {
    device_.failure = failure;
    uint64_t n = 1;
    for (;; ++n) {
      ASSERT_LT(n, 100u);
      auto held = Use(PageOf(2, 0), 1);
      const uint64_t imported = Figure("import_bytes");
      device_.fallible_calls = 0;
      device_.fail_from_call = n;
      auto use = Use(PageOf(1, 10), 3 * kPiecePages);  // two pieces before the one held, one after
      device_.fail_from_call = 0;
      if (use) break;
      EXPECT_TRUE(use.error().code() == ErrorCode::kLimit ||
                  use.error().code() == ErrorCode::kSystem)
          << use.error().message();
      EXPECT_EQ(device_.memories.size(), 1u) << n;
      EXPECT_EQ(device_.buffers.size(), 1u) << n;
      EXPECT_EQ(Figure("import_bytes"), imported) << n;
      EXPECT_EQ(Figure("mapped_pages"), 1u) << n;
      EXPECT_TRUE(held->is_valid());
      ExpectMapped(*held);
    }
    EXPECT_EQ(n, 3 * 5 + 1u) << "three imports of five calls each that can fail";
  }
}

TEST_F(VulkanMapperTest, AFailedCallTakesAwayAtOnceWhatItImported) {
  const domain::PinnedRun run = RunOf(PageOf(1, 10), 2 * kPiecePages);  // three pieces
  std::vector<MappedRun> mapped;
  for (uint64_t n = 1; n <= 15; ++n) {
    device_.fallible_calls = 0;
    device_.fail_from_call = n;
    EXPECT_FALSE(mapper_->map({&run, 1}, domain::Access::kReadWrite, &mapped).has_value()) << n;
    EXPECT_TRUE(device_.is_empty()) << n;
    EXPECT_TRUE(mapped.empty()) << n;
  }
}

TEST_F(VulkanMapperTest, WhereAPieceCannotBeHadThePagesAloneAreImported) {
  const uint64_t hole = host_ + BytesIn(PageOf(1, 12));
  device_.hole = HostRange::FromFirstAndLast(HostAddr(hole), HostAddr(hole + kPageMask));
  auto use = Use(PageOf(1, 3), 2);
  ASSERT_THAT(use, IsOk());
  ExpectMapped(*use);
  EXPECT_EQ(Figure("import_bytes"), BytesIn(2));
  const auto in_hole = Use(PageOf(1, 12), 1);
  ASSERT_THAT(in_hole, FailsWith(ErrorCode::kNotReachable));
  EXPECT_THAT(in_hole.error().message(), HasSubstr("vkAllocateMemory for 4 KiB"));
}

TEST_F(VulkanMapperTest, MemoryThatDriversRefuseIsAPermissionErrorWhenItIsOnlyForReading) {
  device_.failure = VK_ERROR_INVALID_EXTERNAL_HANDLE;
  device_.fail_from_call = 1;
  const domain::PinnedRun run = RunOf(PageOf(1, 0), 1);
  std::vector<MappedRun> mapped;
  EXPECT_THAT(mapper_->map({&run, 1}, domain::Access::kReadWrite, &mapped),
              FailsWith(ErrorCode::kNotReachable));
  EXPECT_THAT(mapper_->map({&run, 1}, domain::Access::kRead, &mapped),
              FailsWith(ErrorCode::kPermission));
  EXPECT_TRUE(mapped.empty());
}

TEST_F(VulkanMapperTest, ThePiecesOfADeviceAreLimitedAndTheErrorSaysHowFar) {
  ImportLimits limits;
  limits.most_imports = 2;
  limits.largest_bytes = BytesIn(kPiecePages);  // no growing
  Open(limits);
  auto a = Use(PageOf(1, 0), 1);
  auto b = Use(PageOf(3, 0), 1);
  const auto c = Use(PageOf(5, 0), 1);
  ASSERT_THAT(c, FailsWith(ErrorCode::kLimit));
  EXPECT_THAT(c.error().message(), HasSubstr("imported in 2 pieces, the vulkan device allows 2;"));
  EXPECT_THAT(Use(PageOf(3, 5), 1), IsOk()) << "in a piece that is there";
  a->reset();
  EXPECT_THAT(Use(PageOf(5, 0), 1), IsOk());
}

TEST_F(VulkanMapperTest, PiecesThatNobodyUsesMakeWayForOthersBeforeTheFlush) {
  ImportLimits limits;
  limits.most_imports = 1;
  Open(limits);
  std::vector<MappedRun> mapped;
  const domain::PinnedRun a = RunOf(PageOf(1, 0), 1);
  const domain::PinnedRun b = RunOf(PageOf(30, 0), 1);
  ASSERT_THAT(mapper_->map({&a, 1}, domain::Access::kReadWrite, &mapped), IsOk());
  mapper_->unmap(mapped[0].address, kPageSize);
  ASSERT_THAT(mapper_->map({&b, 1}, domain::Access::kReadWrite, &mapped), IsOk());
  EXPECT_EQ(device_.at(mapped[1].address), b.host);
  mapper_->unmap(mapped[1].address, kPageSize);
  mapper_->flush();
}

TEST_F(VulkanMapperTest, PiecesGrowAsTheImportsOfTheDeviceRunOut) {
  ImportLimits limits;
  limits.most_imports = 16;
  Open(limits);
  std::vector<DmaMapping> uses;
  for (uint64_t piece = 0; piece + 1 < kPieces; ++piece) {
    auto use = Use(PageOf(piece, 0), 1);
    ASSERT_THAT(use, IsOk()) << piece;
    ExpectMapped(*use);
    uses.push_back(std::move(*use));
  }
  EXPECT_LE(Figure("pieces"), 16u);
  uint64_t small = 0;
  for (const auto& [handle, memory] : device_.memories)
    small += memory.size == BytesIn(kPiecePages);
  EXPECT_GE(small, 8u) << "the first half stays small";
}

TEST_F(VulkanMapperTest, PiecesAreWholeUnitsOfWhatTheDeviceImports) {
  ImportLimits limits;
  limits.alignment = BytesIn(4);
  Open(limits);
  const uint64_t base = PagesIn(uint64_t{1} << 32);
  // From the last page of a unit on, over a whole one, to the middle of the next.
  ASSERT_THAT(container_.map(ram_.map_request(BytesIn(base), BytesIn(PageOf(1, 3)), BytesIn(7))),
              IsOk());
  auto use = Use(base + 2, 1);
  ASSERT_THAT(use, IsOk());
  ASSERT_EQ(device_.memories.size(), 1u);
  EXPECT_EQ(device_.memories.begin()->second.host, host_ + BytesIn(PageOf(1, 4)));
  EXPECT_EQ(device_.memories.begin()->second.size, BytesIn(4));
  for (const uint64_t page : {0u, 5u, 6u}) {
    const auto at_the_edge = Use(base + page, 1);
    ASSERT_THAT(at_the_edge, FailsWith(ErrorCode::kNotReachable)) << page;
    EXPECT_THAT(at_the_edge.error().message(), HasSubstr("units of 16 KiB"));
  }
}

TEST_F(VulkanMapperTest, ADriverThatCannotDoItIsAnErrorOfOneLine) {
  device_.extra_requirement = 1;
  EXPECT_THAT(Use(PageOf(1, 0), 1), FailsWith(ErrorCode::kNotReachable));
  device_.extra_requirement = 0;
  ImportLimits limits;
  limits.coherent_types = 0b0110;
  Open(limits);
  device_.pointer_types = 0b1001;
  EXPECT_THAT(Use(PageOf(1, 0), 1), FailsWith(ErrorCode::kNotReachable));
  device_.pointer_types = 0b1100;
  EXPECT_THAT(Use(PageOf(1, 0), 1), IsOk());
}

}  // namespace
}  // namespace mvgpu::dma
