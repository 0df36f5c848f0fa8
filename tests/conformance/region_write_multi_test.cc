// REGION_WRITE_MULTI: what QEMU sends after it had to queue posted writes.

#include "tests/conformance/server_fixture.h"

namespace mvgpu::testing {
namespace {

class RegionWriteMultiTest : public NegotiatedServerTest {
 protected:
  static Bytes Entry(uint64_t offset, uint32_t region, uint32_t count, uint64_t data) {
    return Bytes{}.U64(offset).U32(region).U32(count).U64(data);
  }
  uint8_t Peek(uint64_t offset) { return std::to_integer<uint8_t>(device_.memory(0)[offset]); }
};

TEST_F(RegionWriteMultiTest, WritesEveryEntryInOrder) {
  const Reply reply = Transact(kRegionWriteMulti, Bytes{}
                                                      .U64(3)
                                                      .Add(Entry(0x10, 0, 1, 0x11))
                                                      .Add(Entry(0x18, 0, 8, 0x8877665544332211))
                                                      .Add(Entry(0x10, 0, 2, 0x2233)));
  ASSERT_THAT(reply, IsReplyOfSize(24));
  EXPECT_EQ(reply.u64(0), 3u);
  EXPECT_THAT(device_.calls, ::testing::ElementsAre("write region=0 offset=0x10 count=1",
                                                    "write region=0 offset=0x18 count=8",
                                                    "write region=0 offset=0x10 count=2"));
  EXPECT_EQ(Peek(0x10), 0x33);
  EXPECT_EQ(Peek(0x11), 0x22);
  EXPECT_EQ(Peek(0x1f), 0x88);
}

TEST_F(RegionWriteMultiTest, PostedBatchOfTwoHundredGetsNoReply) {
  Bytes body = Bytes{}.U64(200);
  for (uint64_t i = 0; i < 200; ++i) body.Add(Entry(i, 0, 1, i));
  client_->command(kRegionWriteMulti, body, {}, kNoReply);
  Serve();
  EXPECT_FALSE(client_->receive());
  EXPECT_EQ(Peek(199), 199);
}

TEST_F(RegionWriteMultiTest, EmptyBatchSucceeds) {
  EXPECT_THAT(Transact(kRegionWriteMulti, Bytes{}.U64(0)), IsReplyOfSize(24));
}

TEST_F(RegionWriteMultiTest, RefusesCountsThatDoNotMatchTheBody) {
  for (const uint64_t count :
       {uint64_t{0}, uint64_t{2}, UINT64_MAX, UINT64_MAX / 24 + 1, UINT64_MAX / 24 + 2}) {
    EXPECT_THAT(Transact(kRegionWriteMulti, Bytes{}.U64(count).Add(Entry(0, 0, 4, 0))),
                IsErrorReply(EINVAL))
        << count;
  }
  EXPECT_THAT(Transact(kRegionWriteMulti, Bytes{}.U32(1)), IsErrorReply(EINVAL));
  EXPECT_TRUE(device_.calls.empty());
}

TEST_F(RegionWriteMultiTest, StopsAtTheFirstBadEntry) {
  for (const Bytes& bad : {Entry(0, 0, 9, 0), Entry(0, 9, 1, 0), Entry(UINT64_MAX, 0, 4, 0),
                           Entry(0, 3, 1, 0), Entry(0, 0, 0xffffffff, 0)}) {
    device_.calls.clear();
    EXPECT_THAT(Transact(kRegionWriteMulti,
                         Bytes{}.U64(3).Add(Entry(1, 0, 1, 1)).Add(bad).Add(Entry(2, 0, 1, 1))),
                IsErrorReply(EINVAL));
    EXPECT_THAT(device_.calls, ::testing::ElementsAre("write region=0 offset=0x1 count=1"));
  }
  ExpectStillServing();
}

}  // namespace
}  // namespace mvgpu::testing
