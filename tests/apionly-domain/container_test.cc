#include "apionly-domain/container.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/fakes/guest_ram.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::domain {
namespace {

using testing::FailsWith;
using testing::GuestRam;
using testing::IsOk;
using testing::IsOkAndHolds;
using testing::MakeRange;

// Keeps what it hears; can refuse.
class ListeningDomain final : public Domain {
 public:
  std::string_view name() const override { return "listener"; }
  Result<void> on_map(const Mapping& mapping) override {
    if (refuse_map) return Fail(ErrorCode::kLimit, "listener is full");
    mapped.push_back(mapping.iova);
    return {};
  }
  void on_map_done(const Mapping& mapping, bool is_mapped) override {
    if (!is_mapped) std::erase(mapped, mapping.iova);
  }
  Result<void> on_unmap(const Unmapping& unmapping) override {
    asked.push_back(unmapping.range);
    if (refuse_unmap) return Fail(ErrorCode::kBusy, "listener holds it");
    return {};
  }
  void on_unmap_done(const Unmapping& unmapping, bool unmapped) override {
    for (const Mapping& mapping : unmapping.mappings) {
      if (unmapped) std::erase(mapped, mapping.iova);
    }
    ++done;
  }

  std::vector<IovaRange> mapped;
  std::vector<IovaRange> asked;
  int done = 0;
  bool refuse_map = false;
  bool refuse_unmap = false;
};

class ContainerTest : public ::testing::Test {
 protected:
  Result<void> Map(uint64_t iova, uint64_t offset, uint64_t size,
                   Access access = Access::kReadWrite) {
    return container_.map(ram_.map_request(iova, offset, size, access));
  }

  GuestRam ram_{64 * kPageSize};
  Container container_;
};

TEST_F(ContainerTest, StoresMappingsAndUnmapsThem) {
  ASSERT_THAT(Map(0x10000, 0, 0x4000), IsOk());
  ASSERT_THAT(Map(0x20000, 0x4000, 0x4000), IsOk());
  EXPECT_EQ(container_.totals().mapped_pages, 8u);
  EXPECT_EQ(container_.totals().files, 1u);
  EXPECT_THAT(container_.unmap(Iova(0x10000), 0x4000), IsOkAndHolds(0x4000u));
  EXPECT_EQ(container_.totals().mappings, 1u);
}

TEST_F(ContainerTest, AnAddressLeadsToItsMapping) {
  ASSERT_THAT(Map(0x10000, 0, 0x4000), IsOk());
  ASSERT_THAT(Map(0x14000, 0x4000, 0x1000), IsOk());  // goes on in the file: still one of its own
  EXPECT_EQ(container_.mapping_at(Iova(0xffff)), std::nullopt);
  EXPECT_EQ(container_.mapping_at(Iova(0x10000)), MakeRange(0x10000, 0x4000));
  EXPECT_EQ(container_.mapping_at(Iova(0x13fff)), MakeRange(0x10000, 0x4000));
  EXPECT_EQ(container_.mapping_at(Iova(0x14000)), MakeRange(0x14000, 0x1000));
  EXPECT_EQ(container_.mapping_at(Iova(0x15000)), std::nullopt);
}

TEST_F(ContainerTest, AnIdenticalRemapIsAcceptedAnOverlapIsNot) {
  ASSERT_THAT(Map(0x10000, 0, 0x4000), IsOk());
  EXPECT_THAT(Map(0x10000, 0, 0x4000), IsOk());
  EXPECT_THAT(Map(0x10000, 0x1000, 0x4000), FailsWith(ErrorCode::kOverlap));
  EXPECT_THAT(Map(0x13000, 0, 0x1000), FailsWith(ErrorCode::kOverlap));
  EXPECT_THAT(Map(0xf000, 0, 0x2000), FailsWith(ErrorCode::kOverlap));
  EXPECT_THAT(Map(0x10000, 0, 0x4000, Access::kRead), FailsWith(ErrorCode::kOverlap));
  EXPECT_THAT(Map(0x14000, 0, 0x1000), IsOk());  // a neighbour
  EXPECT_EQ(container_.totals().mappings, 2u);
}

TEST_F(ContainerTest, AnUnmapRemovesAllInsideAndRefusesToCut) {
  ASSERT_THAT(Map(0x10000, 0, 0x4000), IsOk());
  ASSERT_THAT(Map(0x20000, 0x4000, 0x4000), IsOk());
  EXPECT_THAT(container_.unmap(Iova(0x11000), 0x1000), FailsWith(ErrorCode::kWouldSplit));
  EXPECT_THAT(container_.unmap(Iova(0x10000), 0x11000), FailsWith(ErrorCode::kWouldSplit));
  EXPECT_EQ(container_.totals().mappings, 2u);
  EXPECT_THAT(container_.unmap(Iova(0), uint64_t{1} << 47), IsOkAndHolds(0x8000u));
  EXPECT_EQ(container_.totals().mappings, 0u);
}

TEST_F(ContainerTest, AnUnmapOfNothingSucceeds) {
  EXPECT_THAT(container_.unmap(Iova(0x100000), 0x1000), IsOkAndHolds(0u));
  EXPECT_THAT(container_.unmap_all(), IsOkAndHolds(0u));
}

TEST_F(ContainerTest, RefusesBadRanges) {
  EXPECT_THAT(Map(0x10001, 0, 0x1000), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(Map(0x10000, 0, 0), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(Map(0x10000, 0, 0x1001), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(Map(0x10000, 1, 0x1000), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(Map(UINT64_MAX & ~kPageMask, 0, 0x2000), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(Map(0x10000, 64 * kPageSize, 0x1000), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(Map(0x10000, UINT64_MAX & ~kPageMask, 0x1000), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(container_.unmap(Iova(0x800), 0x1000), FailsWith(ErrorCode::kInvalid));
  EXPECT_EQ(container_.totals().mappings, 0u);
}

TEST_F(ContainerTest, TheLastPageOfTheAddressSpaceIsUsable) {
  ASSERT_THAT(Map(UINT64_MAX & ~kPageMask, 0, kPageSize), IsOk());
  ASSERT_THAT(Map(0, 0, kPageSize), IsOk());
  EXPECT_THAT(container_.unmap(Iova(UINT64_MAX & ~kPageMask), kPageSize), IsOkAndHolds(kPageSize));
  EXPECT_THAT(container_.unmap_all(), IsOkAndHolds(kPageSize));
}

TEST_F(ContainerTest, AMappingWithoutAFileIsKnownButNotReachable) {
  ASSERT_THAT(container_.map({Iova(0xc0000), 0x1000, Access::kRead, UniqueFd(), 0}), IsOk());
  EXPECT_EQ(container_.totals().mapped_pages, 1u);
  EXPECT_EQ(container_.totals().reachable_pages, 0u);
}

TEST_F(ContainerTest, TheMappingLimitIsATypedError) {
  Container small(Container::Limits{.max_mappings = 2});
  ASSERT_THAT(small.map(ram_.map_request(0, 0, kPageSize)), IsOk());
  ASSERT_THAT(small.map(ram_.map_request(0x10000, 0, kPageSize)), IsOk());
  EXPECT_THAT(small.map(ram_.map_request(0x20000, 0, kPageSize)), FailsWith(ErrorCode::kLimit));
  ASSERT_THAT(small.unmap(Iova(0), kPageSize), IsOk());
  EXPECT_THAT(small.map(ram_.map_request(0x20000, 0, kPageSize)), IsOk());
}

TEST_F(ContainerTest, DomainsHearOfMappingsWheneverTheyAttach) {
  ListeningDomain early;
  ListeningDomain late;
  ASSERT_THAT(container_.attach(&early), IsOk());
  ASSERT_THAT(Map(0x10000, 0, 0x1000), IsOk());
  ASSERT_THAT(Map(0x20000, 0, 0x1000), IsOk());
  ASSERT_THAT(container_.attach(&late), IsOk());
  EXPECT_EQ(early.mapped, late.mapped);
  EXPECT_EQ(late.mapped.size(), 2u);
  ASSERT_THAT(container_.unmap(Iova(0x10000), 0x1000), IsOk());
  EXPECT_EQ(late.mapped, std::vector{MakeRange(0x20000, 0x1000)});
  ASSERT_THAT(container_.detach(&early), IsOk());
  EXPECT_TRUE(early.mapped.empty());
  ASSERT_THAT(container_.detach(&late), IsOk());
}

TEST_F(ContainerTest, ARefusedMapLeavesNoTrace) {
  ListeningDomain first;
  ListeningDomain second;
  ASSERT_THAT(container_.attach(&first), IsOk());
  ASSERT_THAT(container_.attach(&second), IsOk());
  second.refuse_map = true;
  EXPECT_THAT(Map(0x10000, 0, 0x1000), FailsWith(ErrorCode::kLimit));
  EXPECT_TRUE(first.mapped.empty());
  EXPECT_EQ(container_.totals().mappings, 0u);
  EXPECT_THAT(container_.detach(&first), IsOk());
  EXPECT_THAT(container_.detach(&second), IsOk());
}

TEST_F(ContainerTest, ARefusedUnmapKeepsTheMappingUsable) {
  ListeningDomain holder;
  ASSERT_THAT(container_.attach(&holder), IsOk());
  ASSERT_THAT(Map(0x10000, 0, 0x1000), IsOk());
  holder.refuse_unmap = true;
  EXPECT_THAT(container_.unmap(Iova(0x10000), 0x1000), FailsWith(ErrorCode::kBusy));
  EXPECT_EQ(holder.mapped.size(), 1u);
  EXPECT_EQ(holder.done, 1);
  EXPECT_THAT(container_.detach(&holder), FailsWith(ErrorCode::kBusy));
  holder.refuse_unmap = false;
  EXPECT_THAT(container_.unmap(Iova(0x10000), 0x1000), IsOk());
  EXPECT_THAT(container_.detach(&holder), IsOk());
}

}  // namespace
}  // namespace mvgpu::domain
