#include "backend/policies/dma_trace.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "tests/fakes/guest_ram.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::backend {
namespace {

using ::testing::ElementsAre;
using testing::FailsWith;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::IsOk;
using testing::MakeRange;

constexpr uint64_t kGiB = uint64_t{1} << 30;

uint32_t Add(DmaTraceBuilder& builder, uint64_t start, uint64_t size) {
  const IovaRange range = MakeRange(start, size);
  return *builder.add_buffer({&range, 1}, dma::Direction::kToDevice);
}

TEST(DmaBufferTest, ASliceIsInTheOrderOfTheBuffer) {
  const DmaBuffer buffer{{{100, 4}, {7, 1}, {50, 3}}, dma::Direction::kToDevice};
  EXPECT_EQ(buffer.pages(), 8u);
  EXPECT_THAT(buffer.slice(0, 8), ElementsAre(PageRun{100, 4}, PageRun{7, 1}, PageRun{50, 3}));
  EXPECT_THAT(buffer.slice(3, 3), ElementsAre(PageRun{103, 1}, PageRun{7, 1}, PageRun{50, 1}));
  EXPECT_THAT(buffer.slice(4, 1), ElementsAre(PageRun{7, 1}));
  EXPECT_THAT(buffer.slice(0, 0), IsEmpty());
}

TEST(DmaTraceBuilderTest, BuffersAreThePagesThatTheirBytesTouch) {
  DmaTraceBuilder builder("t");
  builder.add_memory(MakeRange(0, kGiB));
  const IovaRange parts[] = {MakeRange(0x1ff0, 0x20), MakeRange(0x5000, 0x1000)};
  EXPECT_THAT(builder.add_buffer(parts, dma::Direction::kFromDevice), IsOk());
  EXPECT_EQ(builder.end_of_buffers(), 0x6000u);
  const auto trace = std::move(builder).build();
  ASSERT_THAT(trace, IsOk());
  EXPECT_THAT(trace->buffers.at(0).parts, ElementsAre(PageRun{1, 2}, PageRun{5, 1}));
  EXPECT_EQ(trace->buffers.at(0).direction, dma::Direction::kFromDevice);
}

TEST(DmaTraceBuilderTest, ABufferIsMappedOnceAtATime) {
  DmaTraceBuilder builder("t");
  const uint32_t buffer = Add(builder, 0, 0x4000);
  EXPECT_THAT(builder.unmap(1, buffer), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(builder.access_all(1, buffer), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(builder.map(1, buffer), IsOk());
  EXPECT_THAT(builder.map(2, buffer), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(builder.access(2, buffer, 0, 4), IsOk());
  EXPECT_THAT(builder.access(2, buffer, 1, 4), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(builder.access(2, buffer, 1, UINT64_MAX), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(builder.access(2, buffer, 1, 0), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(builder.unmap(3, buffer), IsOk());
  EXPECT_THAT(builder.map(4, buffer), IsOk());
  builder.add_memory(MakeRange(0, 0x4000));
  const auto trace = std::move(builder).build();
  ASSERT_THAT(trace, IsOk());
  EXPECT_EQ(trace->events.size(), 4u);
}

TEST(DmaTraceBuilderTest, TimeThatRunsBackwardsStandsStill) {
  DmaTraceBuilder builder("t");
  builder.add_memory(MakeRange(0, 0x4000));
  const uint32_t buffer = Add(builder, 0, 0x4000);
  ASSERT_THAT(builder.map(10, buffer), IsOk());
  ASSERT_THAT(builder.unmap(5, buffer), IsOk());
  EXPECT_THAT(builder.map(DmaTraceBuilder::kMaxDurationNs + 1, buffer),
              FailsWith(ErrorCode::kInvalid));
  const auto trace = std::move(builder).build();
  ASSERT_THAT(trace, IsOk());
  ASSERT_EQ(trace->events.size(), 2u);
  EXPECT_EQ(trace->events.back().time_ns, 10u);
}

TEST(DmaTraceBuilderTest, MemoryIsPutTogether) {
  DmaTraceBuilder builder("t");
  builder.add_memory(MakeRange(0x8000, 0x1000));
  builder.add_memory(MakeRange(0x1000, 0x2000));
  builder.add_memory(MakeRange(0x2000, 0x2000));
  builder.add_memory(MakeRange(0x4000, 0x1000));
  builder.add_memory(MakeRange(0x2000, 0x1000));
  Add(builder, 0x2000, 0x3000);
  const auto trace = std::move(builder).build();
  ASSERT_THAT(trace, IsOk());
  EXPECT_THAT(trace->memory, ElementsAre(MakeRange(0x1000, 0x4000), MakeRange(0x8000, 0x1000)));
  EXPECT_EQ(trace->memory_pages(), 5u);
}

TEST(DmaTraceBuilderTest, DmaOutsideOfMemoryIsAnErrorThatSaysWhere) {
  DmaTraceBuilder builder("t");
  builder.add_memory(MakeRange(0, 0x10'0000));
  Add(builder, 0xf'f000, 0x1001);
  const auto trace = std::move(builder).build();
  ASSERT_THAT(trace, FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(trace.error().message(), HasSubstr("0xff000-0x100fff"));
  EXPECT_THAT(trace.error().message(), HasSubstr("--memory"));
  EXPECT_THAT(DmaTraceBuilder("t").build(), FailsWith(ErrorCode::kInvalid));
}

TEST(DmaTraceBuilderTest, AddressesAreBounded) {
  DmaTraceBuilder builder("t");
  const IovaRange far = MakeRange(DmaTraceBuilder::kMaxMemoryBytes - 0x1000, 0x1001);
  EXPECT_THAT(builder.add_buffer({&far, 1}, dma::Direction::kToDevice),
              FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(builder.add_buffer({}, dma::Direction::kToDevice), FailsWith(ErrorCode::kInvalid));
  builder.add_memory(far);
  EXPECT_THAT(std::move(builder).build(), FailsWith(ErrorCode::kInvalid));
}

TEST(DmaTraceBuilderTest, MemoryApartIsAboveAllOtherAndBounded) {
  constexpr uint64_t kStart = DmaTraceBuilder::kMaxMemoryBytes;
  DmaTraceBuilder builder("t");
  const IovaRange first = MakeRange(kStart, 0x1000);
  const IovaRange second = MakeRange(kStart + 0x1000, 0x2000);
  EXPECT_THAT(builder.add_buffer({&first, 1}, dma::Direction::kToDevice),
              FailsWith(ErrorCode::kInvalid));
  EXPECT_FALSE(builder.has_apart());
  EXPECT_EQ(*builder.add_apart(0x1000), first);
  EXPECT_EQ(*builder.add_apart(0x2000), second);
  EXPECT_TRUE(builder.has_apart());
  EXPECT_THAT(builder.add_buffer({&second, 1}, dma::Direction::kToDevice), IsOk());
  const IovaRange across = MakeRange(kStart - 0x1000, 0x2000);
  EXPECT_THAT(builder.add_buffer({&across, 1}, dma::Direction::kToDevice),
              FailsWith(ErrorCode::kInvalid));
  EXPECT_EQ(builder.end_of_buffers(), 0u);
  Add(builder, 0x3000, 0x1000);
  EXPECT_EQ(builder.end_of_buffers(), 0x4000u);
  EXPECT_THAT(builder.add_apart(0), FailsWith(ErrorCode::kLimit));
  EXPECT_THAT(builder.add_apart(0x800), FailsWith(ErrorCode::kLimit));
  EXPECT_THAT(builder.add_apart(DmaTraceBuilder::kMaxApartBytes - 0x2000),
              FailsWith(ErrorCode::kLimit));
  builder.add_memory(MakeRange(0, 0x10000));
  const auto trace = std::move(builder).build();
  ASSERT_THAT(trace, IsOk());
  EXPECT_THAT(trace->memory, ElementsAre(MakeRange(0, 0x10000), MakeRange(kStart, 0x3000)));
}

TEST(DmaTraceBuilderTest, NoMoreIsMappedAtATimeThanCanBePlayed) {
  constexpr uint64_t kMost = DmaTraceBuilder::kMaxMappedBytes;
  DmaTraceBuilder builder("t");
  const uint32_t most = Add(builder, 0, kMost);
  const uint32_t one = Add(builder, kMost, 0x1000);
  EXPECT_THAT(builder.map(0, most), IsOk());
  const auto refused = builder.map(0, one);
  ASSERT_THAT(refused, FailsWith(ErrorCode::kLimit));
  EXPECT_THAT(refused.error().message(), HasSubstr("65536 MiB are mapped"));
  EXPECT_FALSE(builder.is_mapped(one));
  EXPECT_THAT(builder.unmap(0, most), IsOk());
  EXPECT_THAT(builder.map(0, one), IsOk());
  EXPECT_THAT(builder.map(0, most), FailsWith(ErrorCode::kLimit));
}

TEST(PcMemoryTest, HasAHoleBelow4GiB) {
  EXPECT_THAT(PcMemory(kGiB), ElementsAre(MakeRange(0, kGiB)));
  EXPECT_THAT(PcMemory(3 * kGiB), ElementsAre(MakeRange(0, 3 * kGiB)));
  EXPECT_THAT(PcMemory(8 * kGiB),
              ElementsAre(MakeRange(0, 3 * kGiB), MakeRange(4 * kGiB, 5 * kGiB)));
  EXPECT_THAT(PcMemory(0), IsEmpty());
}

}  // namespace
}  // namespace mvgpu::backend
