#include "apionly-domain/base/address.h"

#include <gtest/gtest.h>

namespace mvgpu {
namespace {

TEST(Range, RefusesEmptyAndWrapping) {
  EXPECT_FALSE(IovaRange::FromStartAndSize(Iova(0x1000), 0));
  EXPECT_FALSE(IovaRange::FromStartAndSize(Iova(UINT64_MAX), 2));
  static_assert(UINT64_MAX - 0xfff + 0x2000 < 0x2000, "the crafted range must wrap");
  EXPECT_FALSE(IovaRange::FromStartAndSize(Iova(UINT64_MAX - 0xfff), 0x2000));
}

TEST(Range, TheLastByteOfTheAddressSpaceIsUsable) {
  const auto range = IovaRange::FromStartAndSize(Iova(UINT64_MAX - 0xfff), 0x1000);
  ASSERT_TRUE(range);
  EXPECT_EQ(range->last().value(), UINT64_MAX);
  EXPECT_TRUE(range->contains(Iova(UINT64_MAX)));
  EXPECT_TRUE(range->is_page_aligned());
  EXPECT_EQ(range->page_expanded(), *range);
}

TEST(Range, IntersectsAndExpands) {
  const auto a = *IovaRange::FromStartAndSize(Iova(0x1000), 0x1000);
  const auto b = *IovaRange::FromStartAndSize(Iova(0x1800), 0x1000);
  const auto c = *IovaRange::FromStartAndSize(Iova(0x2000), 0x10);
  EXPECT_EQ(a.intersection(b), IovaRange::FromStartAndSize(Iova(0x1800), 0x800));
  EXPECT_FALSE(a.overlaps(c));  // neighbours do not overlap
  EXPECT_EQ(b.page_expanded(), *IovaRange::FromStartAndSize(Iova(0x1000), 0x2000));
  EXPECT_FALSE(a.contains(b));
  EXPECT_TRUE(b.page_expanded().contains(b));
}

TEST(CheckedArithmetic, ReportsOverflowInsteadOfWrapping) {
  EXPECT_EQ(CheckedAdd(1, 2), 3u);
  EXPECT_FALSE(CheckedAdd(UINT64_MAX, 1));
  EXPECT_EQ(CheckedMul(1u << 20, 4096), uint64_t{1} << 32);
  EXPECT_FALSE(CheckedMul(uint64_t{1} << 32, uint64_t{1} << 32));
}

}  // namespace
}  // namespace mvgpu
