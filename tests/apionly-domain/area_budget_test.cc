#include "apionly-domain/pin/area_budget.h"

#include <gtest/gtest.h>

#include <cstdint>

namespace mvgpu::domain {
namespace {

constexpr uint64_t kPagesOf64GiB = 16ull << 20;

TEST(AreaBudgetTest, HalfOfTheBudgetIsForExactPages) {
  const AreaBudget budget(16384);
  EXPECT_EQ(budget.granule(0, kPagesOf64GiB), 1u);
  EXPECT_EQ(budget.granule(8191, kPagesOf64GiB), 1u);
  EXPECT_EQ(budget.granule(8192, kPagesOf64GiB), 2u);
}

TEST(AreaBudgetTest, GranulesDoubleUntilTheRestOfTheBudgetCoversAllFiles) {
  const AreaBudget budget(16384);
  uint64_t before = 1;
  for (uint64_t used = 8192; used < 12288; ++used) {
    const uint64_t granule = budget.granule(used, kPagesOf64GiB);
    EXPECT_TRUE(granule == before || granule == 2 * before) << used;
    before = granule;
  }
  EXPECT_EQ(before, 8192u);
  EXPECT_EQ(budget.granule(12288, kPagesOf64GiB), 8192u);
  EXPECT_LE(kPagesOf64GiB / 8192, 16384u - 12288);
}

TEST(AreaBudgetTest, GranulesGrowAgainWhenFilesComeLater) {
  const AreaBudget budget(16384);
  EXPECT_EQ(budget.granule(12288, 2 * kPagesOf64GiB), 16384u);
  EXPECT_GE(budget.granule(16384, kPagesOf64GiB), kPagesOf64GiB) << "the last one takes it all";
}

TEST(AreaBudgetTest, SmallFilesAreExactWhateverIsInUse) {
  const AreaBudget budget(16384);
  for (uint64_t used = 0; used < 14336; used += 512) EXPECT_EQ(budget.granule(used, 1024), 1u);
}

TEST(AreaBudgetTest, CutsAreAllowedUpToThreeQuarters) {
  const AreaBudget budget(64);
  EXPECT_TRUE(budget.allows_cut(47));
  EXPECT_FALSE(budget.allows_cut(48));
}

}  // namespace
}  // namespace mvgpu::domain
