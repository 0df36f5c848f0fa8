// Limits, merging, splits and crafted numbers.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

#include "apionly-domain/container.h"
#include "tests/fakes/guest_ram.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::domain {
namespace {

using ::testing::ElementsAre;
using testing::FailsWith;
using testing::GuestRam;
using ::testing::HasSubstr;
using testing::IsOk;
using testing::IsOkAndHolds;
using testing::MakeRange;

constexpr uint64_t kLastPageStart = UINT64_MAX & ~kPageMask;

class ContainerLimitsTest : public ::testing::Test {
 protected:
  // Whole pages of the file at whole pages of IOVAs.
  static Result<void> Map(Container& container, const GuestRam& ram, uint64_t iova_page,
                          uint64_t file_page, uint64_t pages = 1,
                          Access access = Access::kReadWrite) {
    return container.map(
        ram.map_request(BytesIn(iova_page), BytesIn(file_page), BytesIn(pages), access));
  }
  static Result<uint64_t> Unmap(Container& container, uint64_t iova_page, uint64_t pages = 1,
                                Container::Cut cut = Container::Cut::kRefuse) {
    return container.unmap(Iova(BytesIn(iova_page)), BytesIn(pages), cut);
  }
  static std::vector<IovaRange> Ranges(const Container& container) {
    std::vector<IovaRange> ranges;
    for (const Mapping& mapping : container.mappings()) ranges.push_back(mapping.iova);
    return ranges;
  }
  static IovaRange Pages(uint64_t first, uint64_t count) {
    return MakeRange(BytesIn(first), BytesIn(count));
  }

  GuestRam ram_{64 * kPageSize};
  GuestRam other_ram_{64 * kPageSize};
};

// CVE-2019-3882: without a limit the mapper eats all memory.
TEST_F(ContainerLimitsTest, TheTableOf65535IsFullWithATypedErrorAndHasRoomAgainAfterOneUnmap) {
  Container container;
  for (uint64_t i = 0; i < 65535; ++i) ASSERT_THAT(Map(container, ram_, 2 * i, 0), IsOk()) << i;
  const auto refused = Map(container, ram_, 2 * 65535, 0);
  ASSERT_THAT(refused, FailsWith(ErrorCode::kLimit));
  EXPECT_EQ(refused.error().errno_value(), ENOMEM) << "callers recycle mappings on this one";
  EXPECT_THAT(refused.error().message(), HasSubstr("65535 mappings"));
  EXPECT_EQ(container.totals().mappings, 65535u);
  ASSERT_THAT(Unmap(container, 0), IsOkAndHolds(kPageSize));
  EXPECT_THAT(Map(container, ram_, 2 * 65535, 0), IsOk());
  EXPECT_THAT(container.unmap_all(), IsOkAndHolds(65535 * kPageSize));
}

// SPDK stopped at 65535 pieces of 2 MiB: 128 GiB.
TEST_F(ContainerLimitsTest, NeighboursThatContinueInTheFileCountAsOneInAnyOrder) {
  Container container(Container::Limits{.max_mappings = 2});
  for (uint64_t i = 0; i < 16; ++i) ASSERT_THAT(Map(container, ram_, i, i), IsOk());
  for (uint64_t i = 64; i-- > 48;) ASSERT_THAT(Map(container, ram_, i, i), IsOk());
  EXPECT_EQ(container.totals().merged_mappings, 2u);
  EXPECT_THAT(Map(container, ram_, 30, 30), FailsWith(ErrorCode::kLimit));
  for (uint64_t i = 16; i < 48; ++i) ASSERT_THAT(Map(container, ram_, i, i), IsOk());
  EXPECT_EQ(container.totals().merged_mappings, 1u) << "the last piece closed the gap";
  EXPECT_EQ(container.totals().mappings, 64u);
  EXPECT_THAT(Unmap(container, 5), IsOkAndHolds(kPageSize)) << "pieces go one by one";
  EXPECT_EQ(container.totals().merged_mappings, 2u);
  EXPECT_THAT(container.unmap_all(), IsOkAndHolds(63 * kPageSize));
  EXPECT_EQ(container.totals().merged_mappings, 0u);
}

TEST_F(ContainerLimitsTest, NeighboursThatDifferInAnythingCountEach) {
  Container container;
  ASSERT_THAT(Map(container, ram_, 0, 0), IsOk());
  ASSERT_THAT(Map(container, ram_, 1, 2), IsOk());                          // offset
  ASSERT_THAT(Map(container, ram_, 2, 3, 1, Access::kRead), IsOk());        // rights
  ASSERT_THAT(Map(container, other_ram_, 3, 4, 1, Access::kRead), IsOk());  // file
  ASSERT_THAT(container.map({Iova(BytesIn(4)), kPageSize, Access::kRead, UniqueFd(), 0}), IsOk());
  ASSERT_THAT(container.map({Iova(BytesIn(5)), kPageSize, Access::kRead, UniqueFd(), 0}), IsOk());
  EXPECT_EQ(container.totals().merged_mappings, 6u);
}

TEST_F(ContainerLimitsTest, PiecesHaveALimitOfTheirOwn) {
  Container container(Container::Limits{.max_pieces = 3});
  for (uint64_t i = 0; i < 3; ++i) ASSERT_THAT(Map(container, ram_, i, i), IsOk());
  EXPECT_THAT(Map(container, ram_, 3, 3), FailsWith(ErrorCode::kLimit));
  ASSERT_THAT(Unmap(container, 1), IsOk());
  EXPECT_THAT(Map(container, ram_, 1, 1), IsOk());
}

TEST_F(ContainerLimitsTest, TheSizeLimitCountsMemoryWithAFile) {
  Container container(Container::Limits{.max_mapped_bytes = 8 * kPageSize});
  ASSERT_THAT(Map(container, ram_, 0, 0, 6), IsOk());
  ASSERT_THAT(container.map({Iova(BytesIn(100)), 64 * kPageSize, Access::kRead, UniqueFd(), 0}),
              IsOk());
  EXPECT_THAT(Map(container, ram_, 10, 10, 3), FailsWith(ErrorCode::kLimit));
  EXPECT_THAT(Map(container, ram_, 10, 10, 2), IsOk());
  EXPECT_THAT(Map(container, ram_, 0, 0, 6), IsOk()) << "the same again takes no room";
  ASSERT_THAT(Unmap(container, 0, 6), IsOk());
  EXPECT_THAT(Map(container, ram_, 20, 20, 6), IsOk());
}

TEST_F(ContainerLimitsTest, HalvesOfASplitMappingGoInEitherOrder) {
  for (const bool front_first : {true, false}) {
    SCOPED_TRACE(front_first);
    Container container;
    ASSERT_THAT(Map(container, ram_, 10, 0, 8), IsOk());
    EXPECT_THAT(Unmap(container, front_first ? 10 : 14, 4), FailsWith(ErrorCode::kWouldSplit));
    ASSERT_THAT(Unmap(container, front_first ? 10 : 14, 4, Container::Cut::kSplit),
                IsOkAndHolds(4 * kPageSize));
    EXPECT_THAT(Ranges(container), ElementsAre(Pages(front_first ? 14 : 10, 4)));
    EXPECT_EQ(container.mappings()[0].file_offset, front_first ? 4 * kPageSize : 0);
    EXPECT_EQ(container.totals().merged_mappings, 1u);
    EXPECT_THAT(Unmap(container, front_first ? 14 : 10, 4), IsOkAndHolds(4 * kPageSize));
    EXPECT_EQ(container.totals().mapped_pages, 0u);
    EXPECT_EQ(container.totals().merged_mappings, 0u);
  }
}

TEST_F(ContainerLimitsTest, ASplitOverSeveralMappingsCutsTheOutermostOnly) {
  Container container;
  for (uint64_t i = 0; i < 3; ++i) ASSERT_THAT(Map(container, ram_, 10 * i, 0, 8), IsOk());
  EXPECT_THAT(Unmap(container, 4, 18, Container::Cut::kSplit), IsOkAndHolds(14 * kPageSize));
  EXPECT_THAT(Ranges(container), ElementsAre(Pages(0, 4), Pages(22, 6)));
  EXPECT_EQ(container.totals().mapped_pages, 10u);
  EXPECT_THAT(Map(container, ram_, 4, 4, 4), IsOk());
  EXPECT_EQ(container.totals().merged_mappings, 2u) << "the part that came back continues the rest";
}

TEST_F(ContainerLimitsTest, ASplitThatNeedsOneMappingTooManyIsRefused) {
  Container container(Container::Limits{.max_mappings = 1});
  ASSERT_THAT(Map(container, ram_, 0, 0, 8), IsOk());
  EXPECT_THAT(Unmap(container, 3, 2, Container::Cut::kSplit), FailsWith(ErrorCode::kLimit));
  EXPECT_EQ(container.totals().mapped_pages, 8u);
  EXPECT_THAT(Unmap(container, 6, 2, Container::Cut::kSplit), IsOk()) << "an end costs nothing";
}

TEST_F(ContainerLimitsTest, ASplitMappingIsNotWhatWasMappedOnce) {
  Container container;
  ASSERT_THAT(Map(container, ram_, 0, 0, 8), IsOk());
  EXPECT_THAT(Map(container, ram_, 0, 0, 8), IsOk());
  ASSERT_THAT(Unmap(container, 7, 1, Container::Cut::kSplit), IsOk());
  EXPECT_THAT(Map(container, ram_, 0, 0, 8), FailsWith(ErrorCode::kOverlap));
  EXPECT_THAT(Map(container, ram_, 0, 0, 7), IsOk()) << "but this is there";
  EXPECT_EQ(container.totals().mappings, 1u);
}

TEST_F(ContainerLimitsTest, NumbersThatWrapAreRefusedWhereverTheyStand) {
  struct Crafted {
    uint64_t iova, size, offset;
  };
  Container container;
  for (const Crafted bad :
       {Crafted{kLastPageStart, 2 * kPageSize, 0}, Crafted{kPageSize, kLastPageStart, 0},
        Crafted{kLastPageStart, kLastPageStart, 0}, Crafted{0, 0, 0},
        Crafted{0, kPageSize, kLastPageStart}, Crafted{0, 2 * kPageSize, kLastPageStart},
        Crafted{0, kLastPageStart, kPageSize}}) {
    SCOPED_TRACE(bad.iova);
    SCOPED_TRACE(bad.size);
    EXPECT_THAT(container.map(ram_.map_request(bad.iova, bad.offset, bad.size)),
                FailsWith(ErrorCode::kInvalid));
  }
  EXPECT_THAT(container.unmap(Iova(kLastPageStart), 2 * kPageSize), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(container.unmap(Iova(0), 0), FailsWith(ErrorCode::kInvalid));
  EXPECT_EQ(container.totals().mappings, 0u);
}

TEST_F(ContainerLimitsTest, UnmapReachesTheLastByteOfTheAddressSpace) {
  Container container;
  ASSERT_THAT(container.map(ram_.map_request(kLastPageStart, 0, kPageSize)), IsOk());
  const uint64_t half = uint64_t{1} << 63;
  EXPECT_THAT(container.unmap(Iova(0), half), IsOkAndHolds(0u));
  EXPECT_THAT(container.unmap(Iova(half), half), IsOkAndHolds(kPageSize));
}

TEST_F(ContainerLimitsTest, UnmapAllTwiceIsNothingTheSecondTime) {
  Container container;
  EXPECT_THAT(container.unmap_all(), IsOkAndHolds(0u));
  ASSERT_THAT(Map(container, ram_, 0, 0, 4), IsOk());
  EXPECT_THAT(container.unmap_all(), IsOkAndHolds(4 * kPageSize));
  EXPECT_THAT(container.unmap_all(), IsOkAndHolds(0u));
}

TEST_F(ContainerLimitsTest, AFileIsOneHoweverManyDescriptorsBringItAndGoesWithItsLastMapping) {
  Container container;
  for (uint64_t i = 0; i < 8; ++i) ASSERT_THAT(Map(container, ram_, 10 * i, i), IsOk());
  ASSERT_THAT(Map(container, other_ram_, 100, 0), IsOk());
  EXPECT_EQ(container.totals().files, 2u);
  const std::weak_ptr<GuestFile> file = container.mappings()[0].file;
  for (uint64_t i = 0; i < 8; ++i) {
    EXPECT_FALSE(file.expired());
    ASSERT_THAT(Unmap(container, 10 * i), IsOk());
  }
  EXPECT_TRUE(file.expired());
  EXPECT_EQ(container.totals().files, 1u);
}

TEST_F(ContainerLimitsTest, FilesThatMayBeTruncatedAreReported) {
  GuestRam unsealed(4 * kPageSize, /*seals=*/0);
  Container container;
  ASSERT_THAT(Map(container, ram_, 0, 0), IsOk());
  EXPECT_EQ(container.unsealed_files_seen(), 0u);
  ASSERT_THAT(Map(container, unsealed, 10, 0), IsOk());
  EXPECT_EQ(container.unsealed_files_seen(), 1u);
}

}  // namespace
}  // namespace mvgpu::domain
