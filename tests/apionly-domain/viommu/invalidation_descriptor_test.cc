#include "apionly-domain/viommu/invalidation_descriptor.h"

#include <gtest/gtest.h>

#include <array>
#include <random>

namespace mvgpu::domain {
namespace {

using Words = std::array<uint64_t, 4>;

tl::expected<InvalidationDescriptor, QueueError> Decode(uint64_t low, uint64_t high = 0,
                                                        DescriptorRules rules = {}) {
  return DecodeInvalidation(Words{low, high, 0, 0}, rules);
}
template <typename T>
void ExpectDecoded(uint64_t low, uint64_t high, const T& expected) {
  const auto decoded = Decode(low, high);
  ASSERT_TRUE(decoded) << "error " << static_cast<int>(decoded.error());
  ASSERT_TRUE(std::holds_alternative<T>(*decoded)) << decoded->index();
  EXPECT_EQ(std::get<T>(*decoded), expected);
}
void ExpectError(uint64_t low, uint64_t high, QueueError error) {
  const auto decoded = Decode(low, high);
  ASSERT_FALSE(decoded) << std::hex << low << " " << high;
  EXPECT_EQ(decoded.error(), error) << std::hex << low << " " << high;
}
IovaRange Pages(uint64_t first, uint64_t count) {
  return *IovaRange::FromStartAndSize(Iova(first), BytesIn(count));
}
IovaRange All() { return IovaRange::FromFirstAndLast(Iova(0), Iova(~uint64_t{0})); }

TEST(InvalidationDescriptorTest, ContextCache) {
  using G = ContextInvalidation::Granularity;
  ExpectDecoded(0x0000'3a91'0042'0031, 0,
                ContextInvalidation{.granularity = G::kDevice, .domain = 0x42, .source = 0x3a91});
  ExpectDecoded(0x11, 0, ContextInvalidation{});
  ExpectDecoded(0x0042'0021, 0, ContextInvalidation{.granularity = G::kDomain, .domain = 0x42});
  ExpectError(0x01, 0, QueueError::kReserved);
}

TEST(InvalidationDescriptorTest, TheFunctionMaskSaysWhichBitsCount) {
  const std::array<SourceId, 4> masks{0xffff, 0xfffb, 0xfff9, 0xfff8};
  for (uint64_t fm = 0; fm < 4; ++fm) {
    const auto decoded = Decode(fm << 48 | 0x0000'3a91'0042'0031);
    ASSERT_TRUE(decoded);
    EXPECT_EQ(std::get<ContextInvalidation>(*decoded).source_mask(), masks[fm]);
  }
}

TEST(InvalidationDescriptorTest, Iotlb) {
  using G = IotlbInvalidation::Granularity;
  ExpectDecoded(
      0x42'00f2, 0x567'8000,
      IotlbInvalidation{.granularity = G::kPages, .domain = 0x42, .range = Pages(0x567'8000, 1)});
  ExpectDecoded(0x42'0032, 0x567'9042,
                IotlbInvalidation{.granularity = G::kPages,
                                  .domain = 0x42,
                                  .range = Pages(0x567'8000, 4),
                                  .leaf_only = true});
  ExpectDecoded(0x42'0022, 0, IotlbInvalidation{.granularity = G::kDomain, .domain = 0x42});
  ExpectDecoded(0x12, 0, IotlbInvalidation{});
  ExpectError(0x02, 0, QueueError::kReserved);
}

TEST(InvalidationDescriptorTest, ARangeIsNoLargerThanTheUnitSays) {
  const DescriptorRules rules{.most_address_mask = 9};
  EXPECT_TRUE(Decode(0x32, 9, rules));
  EXPECT_EQ(Decode(0x32, 10, rules).error(), QueueError::kReserved);
  EXPECT_TRUE(Decode(0x36, 9, rules));
  EXPECT_EQ(Decode(0x36, 10, rules).error(), QueueError::kReserved);
  EXPECT_TRUE(Decode(0x22, 10, rules)) << "not of pages";
}

TEST(InvalidationDescriptorTest, DeviceTlb) {
  ExpectDecoded(0x0000'3a91'0010'0003, 0x7f12'3456'7001,
                DeviceTlbInvalidation{.source = 0x3a91, .range = Pages(0x7f12'3456'0000, 16)});
  ExpectDecoded(0x0000'3a91'0010'0003, 0x7f12'3456'7000,
                DeviceTlbInvalidation{.source = 0x3a91, .range = Pages(0x7f12'3456'7000, 1)});
  ExpectDecoded(0x0000'3a91'0010'0003, 0x7fff'ffff'ffff'f001,
                DeviceTlbInvalidation{.source = 0x3a91, .range = All()});
  ExpectDecoded(0x0000'3a91'0010'0003, 0xffff'ffff'ffff'f001,
                DeviceTlbInvalidation{.source = 0x3a91, .range = All()});
  // PFSID is in 15:12 and 63:52.
  EXPECT_TRUE(Decode(0xfff0'3a91'0010'f003, 0));
}

TEST(InvalidationDescriptorTest, InterruptEntries) {
  ExpectDecoded(0x04, 0, InterruptEntryInvalidation{});
  ExpectDecoded(0x1234'1800'0014, 0,
                InterruptEntryInvalidation{.is_global = false, .index = 0x1234, .index_mask = 3});
}

TEST(InvalidationDescriptorTest, Wait) {
  ExpectDecoded(0x0000'0002'0000'0065, 0x9000,
                InvalidationWait{.status_address = 0x9000, .status = 2, .is_fence = true});
  ExpectDecoded(0x15, 0, InvalidationWait{.interrupts = true});
  ExpectDecoded(
      0xc5, 0,
      InvalidationWait{.status_address = {}, .is_fence = true, .drains_page_requests = true});
  EXPECT_EQ(Decode(0x85, 0, {.may_drain = false}).error(), QueueError::kReserved);
}

TEST(InvalidationDescriptorTest, PasidIotlb) {
  ExpectDecoded(0x0001'2345'0042'0036, 0x0000'7f12'3456'0004,
                PasidIotlbInvalidation{
                    .domain = 0x42, .pasid = 0x12345, .range = Pages(0x7f12'3456'0000, 16)});
  ExpectDecoded(0x0001'2345'0042'0026, 0, PasidIotlbInvalidation{.domain = 0x42, .pasid = 0x12345});
  ExpectError(0x06, 0, QueueError::kReserved);
  ExpectError(0x16, 0, QueueError::kReserved);
}

TEST(InvalidationDescriptorTest, PasidCache) {
  using G = PasidCacheInvalidation::Granularity;
  ExpectDecoded(0x0001'2345'0042'0017, 0,
                PasidCacheInvalidation{.granularity = G::kPasid, .domain = 0x42, .pasid = 0x12345});
  ExpectDecoded(0x42'0007, 0, PasidCacheInvalidation{.granularity = G::kDomain, .domain = 0x42});
  ExpectDecoded(0x37, 0, PasidCacheInvalidation{.granularity = G::kGlobal});
  ExpectError(0x27, 0, QueueError::kReserved);
}

TEST(InvalidationDescriptorTest, PasidDeviceTlb) {
  ExpectDecoded(0x0001'2345'3a91'0108, 0x0000'7f12'3456'7800,
                DeviceTlbInvalidation{
                    .source = 0x3a91, .pasid = 0x12345, .range = Pages(0x7f12'3456'0000, 16)});
  ExpectDecoded(0x0001'2345'3a91'0108, 0x0000'7f12'3456'7001,
                DeviceTlbInvalidation{.source = 0x3a91,
                                      .pasid = 0x12345,
                                      .all_pasids = true,
                                      .range = Pages(0x7f12'3456'7000, 1)});
}

TEST(InvalidationDescriptorTest, PageGroupResponse) {
  using Code = FaultAnswer;
  for (const auto& [low, code] : {std::pair{0x0001'2345'3a91'0019u + 0ul, Code::kSuccess},
                                  std::pair{0x0001'2345'3a91'1019u + 0ul, Code::kInvalid},
                                  std::pair{0x0001'2345'3a91'f019u + 0ul, Code::kFailure}}) {
    ExpectDecoded(low, 0xd2c,
                  VtdGroupResponse{.requester = 0x3a91,
                                   .pasid = 0x12345,
                                   .group = 0x1a5,
                                   .is_last = true,
                                   .answer = code});
  }
  ExpectDecoded(0x0000'0000'3a91'0009, 0xd28,
                VtdGroupResponse{
                    .requester = 0x3a91, .pasid = std::nullopt, .group = 0x1a5, .is_last = false});
  ExpectError(0x3a91'2009, 0xd2c, QueueError::kReserved);
}

// One good descriptor of each type, and every bit of it that must be 0.
struct TypeCase {
  uint64_t low, high;
  uint64_t reserved_low, reserved_high;
  bool is_wide;
};
const TypeCase kTypes[] = {
    {0x0000'3a91'0042'0031, 0, 0xfffc'0000'0000'f1c0, ~uint64_t{0}, false},
    {0x0042'00f2, 0x567'8000, 0xffff'ffff'0000'f100, 0xf80, false},
    {0x0000'3a91'0010'0003, 0x7f12'3456'7000, 0x000f'0000'ffe0'01f0, 0xffe, false},
    {0x0000'1234'0000'0014, 0, 0xffff'0000'07ff'f1e0, ~uint64_t{0}, false},
    {0x0000'0002'0000'0065, 0x9000, 0xffff'f100, 0x3, false},
    {0x0001'2345'0042'0036, 0x0000'7f12'3456'0004, 0xfff0'0000'0000'f1c0, 0xf80, true},
    {0x0001'2345'0042'0017, 0, 0xfff0'0000'0000'f1c0, ~uint64_t{0}, true},
    {0x0001'2345'3a91'0108, 0x0000'7f12'3456'7800, 0, 0x7fe, true},
    {0x0001'2345'3a91'0019, 0xd2c, 0xfff0'0000'0000'01e0, 0xffff'ffff'ffff'f003, true},
};

TEST(InvalidationDescriptorTest, EachReservedBitIsAnErrorAndNoOtherBitIs) {
  for (const TypeCase& type : kTypes) {
    for (unsigned bit = 0; bit < 256; ++bit) {
      Words words{type.low, type.high, 0, 0};
      words[bit / 64] |= uint64_t{1} << bit % 64;
      const auto decoded = DecodeInvalidation(words, {.most_address_mask = 63});
      const bool is_type = bit < 4 || (bit >= 9 && bit < 12);
      if (is_type) continue;
      const bool is_code = (type.low & 0xf) == 9 && bit >= 12 && bit < 16;
      if (is_code) continue;
      const bool is_reserved =
          bit >= 128 ||
          ((bit < 64 ? type.reserved_low : type.reserved_high) >> (bit % 64) & 1) != 0;
      EXPECT_EQ(decoded.has_value(), !is_reserved) << "type " << (type.low & 0xf) << " bit " << bit;
      if (!decoded) {
        EXPECT_EQ(decoded.error(), QueueError::kReserved);
      }
    }
  }
}

TEST(InvalidationDescriptorTest, TypesThatDoNotExistAreErrors) {
  for (uint64_t type = 0; type < 128; ++type) {
    if (type >= 1 && type <= 9) continue;
    ExpectError((type & 0xf) | (type >> 4) << 9, 0, QueueError::kType);
  }
}

TEST(InvalidationDescriptorTest, WideOnesDoNotFitIntoANarrowQueue) {
  for (const TypeCase& type : kTypes) {
    const auto decoded = DecodeInvalidation(std::array{type.low, type.high}, {});
    ASSERT_EQ(decoded.has_value(), !type.is_wide) << (type.low & 0xf);
    if (!decoded) {
      EXPECT_EQ(decoded.error(), QueueError::kWidth);
    }
  }
}

TEST(InvalidationDescriptorTest, AnyBitsAreDecodedOrRefused) {
  std::mt19937_64 random(7);
  int good = 0;
  for (int i = 0; i < 200'000; ++i) {
    Words words{random() & random() & random(), random() & random(), 0, 0};
    words[0] = (words[0] & ~uint64_t{0xfff}) | (words[0] & 0x1f0) | (1 + random() % 9);
    const auto decoded = DecodeInvalidation(words, {});
    if (!decoded) continue;
    ++good;
    if (const auto* pages = std::get_if<PasidIotlbInvalidation>(&*decoded)) {
      ASSERT_LE(pages->pasid, vtd::kPasidMask);
      if (pages->range) {
        ASSERT_LE(pages->range->size(), uint64_t{1} << 30);
      }
    }
  }
  EXPECT_GT(good, 1000);
}

}  // namespace
}  // namespace mvgpu::domain
