#include "apionly-domain/faults/smmu_entries.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/fakes/result_matchers.h"

namespace mvgpu::domain {
namespace {

using testing::FailsWith;
using testing::IsOkAndHolds;
using Config = SmmuStreamEntry::Config;

// VMID 7, descriptors at 0x80000000, sixteen of them; stage 2 of 39 bits from level 1 on, to 40.
constexpr SmmuStreamEntry kNested{
    {0x2000'0000'8000'000f, 0x0000'1000'0000'00d6, 0x064a'3559'0000'0007, 0x9000'0000}};
// ASID 0x11, 39 bits to 40; stall, record, abort.
constexpr SmmuContextDescriptor kDescriptor{{0x0011'f202'c000'3519, 0xa000'0000}};

TEST(SmmuStreamEntryTest, VectorNested) {
  EXPECT_TRUE(kNested.is_valid());
  EXPECT_EQ(kNested.config(), Config::kNested);
  EXPECT_EQ(kNested.descriptors(), 16u);
  EXPECT_EQ(kNested.without_substream(), SmmuStreamEntry::WithoutSubstream::kFirstDescriptor);
  EXPECT_EQ(kNested.descriptor_of(5), 0x8000'0140u);
  EXPECT_EQ(kNested.descriptor_of(15), 0x8000'03c0u);
  EXPECT_EQ(kNested.descriptor_of(16), std::nullopt);
  EXPECT_EQ(kNested.vmid(), 7);
  EXPECT_EQ(kNested.stage2_root(), 0x9000'0000u);
  EXPECT_TRUE(kNested.stalls_stage2());
  EXPECT_TRUE(kNested.records_stage2());
  EXPECT_FALSE(kNested.keeps_stage1_from_stalling());
  const auto stage2 = kNested.stage2();
  ASSERT_TRUE(stage2);
  EXPECT_EQ(stage2->t0sz, 25);
  EXPECT_EQ(stage2->sl0, 1);
  EXPECT_EQ(stage2->output_bits, 40);
  EXPECT_FALSE(stage2->flags.ignores_access_flag);
}

TEST(SmmuStreamEntryTest, VectorOtherConfigurations) {
  const auto with = [](uint64_t first) { return SmmuStreamEntry{{first}}; };
  EXPECT_EQ(with(0x8000'000b).config(), Config::kStage1);
  EXPECT_TRUE(with(0x8000'000b).has_stage1());
  EXPECT_FALSE(with(0x8000'000b).has_stage2());
  EXPECT_EQ(with(0x8000'000b).descriptor_of(0), 0x8000'0000u);
  EXPECT_EQ(with(0xd).config(), Config::kStage2);
  EXPECT_FALSE(with(0xd).has_stage1());
  EXPECT_EQ(with(0xd).descriptor_of(0), std::nullopt);
  EXPECT_EQ(with(0x9).config(), Config::kBypass);
  EXPECT_EQ(with(0x1).config(), Config::kAbort);
  EXPECT_TRUE(with(0x1).is_valid());
  EXPECT_FALSE(with(0x8).is_valid());
  for (const uint64_t reserved : {0x3, 0x5, 0x7}) EXPECT_EQ(with(reserved).config(), std::nullopt);
}

TEST(SmmuStreamEntryTest, WhatDoesNotExistIsNothing) {
  SmmuStreamEntry entry = kNested;
  entry.words[0] |= 2 << 4;  // two levels
  EXPECT_EQ(entry.descriptor_of(0), std::nullopt);
  entry.words[0] &= (uint64_t{1} << 59) - 1;  // one descriptor needs no table
  EXPECT_EQ(entry.descriptor_of(0), 0x8000'0000u);
  entry = kNested;
  entry.words[1] |= 1;
  EXPECT_EQ(entry.without_substream(), std::nullopt);
  for (const unsigned bit : {46u, 48u + 2, 51u}) {  // pages of 64 KiB, 2 | 4: no size, 32 bits
    entry = kNested;
    entry.words[2] ^= uint64_t{1} << bit;
    if (bit == 48u + 2) entry.words[2] |= uint64_t{7} << 48;
    EXPECT_EQ(entry.stage2(), std::nullopt) << bit;
  }
  entry = kNested;
  entry.words[2] |= uint64_t{1} << 53;
  EXPECT_TRUE(entry.stage2()->flags.ignores_access_flag);
}

TEST(SmmuContextDescriptorTest, VectorOfSubstream5) {
  EXPECT_TRUE(kDescriptor.is_valid());
  EXPECT_EQ(kDescriptor.asid(), 0x11);
  EXPECT_EQ(kDescriptor.root(), 0xa000'0000u);
  EXPECT_TRUE(kDescriptor.aborts());
  EXPECT_TRUE(kDescriptor.records());
  EXPECT_TRUE(kDescriptor.stalls(kNested));
  const auto stage1 = kDescriptor.stage1();
  ASSERT_TRUE(stage1);
  EXPECT_EQ(stage1->t0sz, 25);
  EXPECT_EQ(stage1->output_bits, 40);
  EXPECT_FALSE(stage1->flags.ignores_access_flag);
  EXPECT_FALSE(stage1->flags.sets_access_flag);
  EXPECT_FALSE(stage1->flags.sets_dirty);
}

TEST(SmmuContextDescriptorTest, EachBitMatters) {
  for (const unsigned bit : {6u, 14u, 31u, 41u}) {  // TG0, EPD0, V, AA64
    SmmuContextDescriptor other = kDescriptor;
    other.words[0] ^= uint64_t{1} << bit;
    EXPECT_EQ(other.stage1(), std::nullopt) << bit;
  }
  SmmuContextDescriptor other = kDescriptor;
  other.words[0] |= uint64_t{7} << 32;
  EXPECT_EQ(other.stage1(), std::nullopt);
  other = kDescriptor;
  other.words[0] |= uint64_t{1} << 35 | uint64_t{1} << 43;
  EXPECT_TRUE(other.stage1()->flags.ignores_access_flag);
  EXPECT_TRUE(other.stage1()->flags.sets_access_flag);
  other.words[0] |= uint64_t{1} << 42;
  EXPECT_TRUE(other.stage1()->flags.sets_dirty);
  other.words[0] &= ~(uint64_t{1} << 44);
  EXPECT_FALSE(other.stalls(kNested));
  SmmuStreamEntry stream = kNested;
  stream.words[1] |= 1 << 27;
  EXPECT_FALSE(kDescriptor.stalls(stream));
}

TEST(SmmuInvalidationTest, VectorOfOneLeaf) {
  const SmmuInvalidation::Words words{0x0011'0007'0000'0012, 0x20'1234'5001};
  const SmmuInvalidation leaf{SmmuInvalidation::Kind::kAddress, 7, 0x11, true, 0x20'1234'5000};
  EXPECT_THAT(SmmuInvalidation::Decode(words), IsOkAndHolds(leaf));
  EXPECT_EQ(leaf.encode(), words);
}

TEST(SmmuInvalidationTest, EachKindHasItsFields) {
  using Kind = SmmuInvalidation::Kind;
  for (const SmmuInvalidation& one : {SmmuInvalidation{Kind::kAsid, 7, 0x11, false, 0},
                                      SmmuInvalidation{Kind::kVmAll, 7, 0, false, 0},
                                      SmmuInvalidation{Kind::kStage2, 7, 0, true, 0x4567'8000}}) {
    EXPECT_THAT(SmmuInvalidation::Decode(one.encode()), IsOkAndHolds(one));
  }
  EXPECT_THAT(SmmuInvalidation::Decode({0x44, 0}), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(SmmuInvalidation::Decode({~uint64_t{0}, 0}), FailsWith(ErrorCode::kInvalid));
  const auto vm = SmmuInvalidation::Decode({0x0011'0007'0000'0028, 0x1001});
  EXPECT_THAT(vm, IsOkAndHolds(SmmuInvalidation{Kind::kVmAll, 7, 0, false, 0}));
}

}  // namespace
}  // namespace mvgpu::domain
