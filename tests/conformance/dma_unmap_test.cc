// DMA_UNMAP (libvfio-user test/py/test_dma_unmap.py), with a real container behind it.

#include "tests/conformance/server_fixture.h"

namespace mvgpu::testing {
namespace {

constexpr uint32_t kBitmap = 1, kAll = 2;

class DmaUnmapTest : public NegotiatedServerTest {
 protected:
  void SetUp() override {
    NegotiatedServerTest::SetUp();
    for (const uint64_t iova : {0x1000u, 0x2000u, 0x8000u}) {
      ASSERT_THAT(Transact(kDmaMap, Bytes{}.U32(32).U32(3).U64(0).U64(iova).U64(0x1000)),
                  IsReplyOfSize(16));
    }
  }
  Reply Unmap(uint64_t iova, uint64_t size, uint32_t flags = 0, uint32_t argsz = 24) {
    return Transact(kDmaUnmap, Bytes{}.U32(argsz).U32(flags).U64(iova).U64(size));
  }
  uint64_t mappings() const { return device_.container.totals().mappings; }
};

// 40 bytes: Cloud Hypervisor waits for exactly these.
TEST_F(DmaUnmapTest, UnmapsExactlyAndEchoesTheRequest) {
  const Reply reply = Unmap(0x2000, 0x1000);
  ASSERT_THAT(reply, IsReplyOfSize(40));
  EXPECT_EQ(reply.u32(0), 24u);
  EXPECT_EQ(reply.u32(4), 0u);
  EXPECT_EQ(reply.u64(8), 0x2000u);
  EXPECT_EQ(reply.u64(16), 0x1000u);
  EXPECT_EQ(mappings(), 2u);
}

TEST_F(DmaUnmapTest, UnmapsEveryMapInsideTheRange) {
  EXPECT_THAT(Unmap(0, uint64_t{1} << 47), IsReplyOfSize(40));
  EXPECT_EQ(mappings(), 0u);
}

// libvfio-user answers ENOENT; vIOMMU domain switches make it ordinary.
TEST_F(DmaUnmapTest, SucceedsWhenNothingIsThere) {
  EXPECT_THAT(Unmap(0x100000, 0x1000), IsReplyOfSize(40));
  EXPECT_THAT(Unmap(uint64_t{1} << 47, uint64_t{1} << 47), IsReplyOfSize(40));
  EXPECT_EQ(mappings(), 3u);
}

TEST_F(DmaUnmapTest, UnmapsAll) {
  const Reply reply = Unmap(0, 0, kAll);
  ASSERT_THAT(reply, IsReplyOfSize(40));
  EXPECT_EQ(reply.u32(4), kAll);
  EXPECT_EQ(mappings(), 0u);
  EXPECT_THAT(Unmap(0, 0, kAll), IsReplyOfSize(40)) << "also when nothing is left";
}

TEST_F(DmaUnmapTest, UnmapAllTakesNeitherRangeNorBitmap) {
  EXPECT_THAT(Unmap(0x1000, 0, kAll), IsErrorReply(EINVAL));
  EXPECT_THAT(Unmap(0, 0x1000, kAll), IsErrorReply(EINVAL));
  EXPECT_THAT(Unmap(0, 0, kAll | kBitmap), IsErrorReply(EINVAL));
  EXPECT_EQ(mappings(), 3u);
}

TEST_F(DmaUnmapTest, RefusesShortBodyAndBadArgsz) {
  EXPECT_THAT(Transact(kDmaUnmap, Bytes{}.U32(24).U32(0)), IsErrorReply(EINVAL));
  EXPECT_THAT(Unmap(0x1000, 0x1000, 0, 8), IsErrorReply(EINVAL));
  EXPECT_THAT(Unmap(0x1000, 0x1000, 0, kMegabyte + 8), IsErrorReply(EINVAL));
  EXPECT_EQ(mappings(), 3u);
  EXPECT_THAT(Unmap(0x1000, 0x1000, 0, kMegabyte), IsReplyOfSize(40));
}

TEST_F(DmaUnmapTest, RefusesUnknownFlagsAndDirtyBitmaps) {
  EXPECT_THAT(Unmap(0x1000, 0x1000, 4), IsErrorReply(EINVAL));
  EXPECT_THAT(
      Transact(kDmaUnmap,
               Bytes{}.U32(48).U32(kBitmap).U64(0x1000).U64(0x1000).U64(0x1000).U64(UINT64_MAX)),
      IsErrorReply(EINVAL));
  EXPECT_EQ(mappings(), 3u);
}

TEST_F(DmaUnmapTest, PassesTheContainersRefusalOn) {
  ASSERT_THAT(Transact(kDmaMap, Bytes{}.U32(32).U32(3).U64(0).U64(0x10000).U64(0x4000)),
              IsReplyOfSize(16));
  EXPECT_THAT(Unmap(0x10000, 0x1000), IsErrorReply(EINVAL)) << "would cut a map";
  EXPECT_THAT(Unmap(0x10000, 0), IsErrorReply(EINVAL));
  EXPECT_THAT(Unmap(0xfffffffffffff000, 0x2000), IsErrorReply(EINVAL));
  EXPECT_EQ(mappings(), 4u);
  device_.next_unmap_error = ErrorCode::kBusy;
  EXPECT_THAT(Unmap(0x10000, 0x4000), IsErrorReply(EBUSY));
  EXPECT_THAT(Unmap(0x10000, 0x4000), IsReplyOfSize(40));
  EXPECT_EQ(mappings(), 3u);
}

}  // namespace
}  // namespace mvgpu::testing
