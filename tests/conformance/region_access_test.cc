// REGION_READ and REGION_WRITE (the wire part of libvfio-user test/py/test_setup_region.py).

#include <thread>

#include "tests/conformance/server_fixture.h"

namespace mvgpu::testing {
namespace {

constexpr uint32_t kBar0 = 0, kReadOnlyBar = 2, kAbsentBar = 3, kWriteOnlyBar = 4, kConfig = 7;

class RegionAccessTest : public NegotiatedServerTest {
 protected:
  Reply Read(uint32_t region, uint64_t offset, uint32_t count) {
    return Transact(kRegionRead, Bytes{}.U64(offset).U32(region).U32(count));
  }
  Reply Write(uint32_t region, uint64_t offset, const Bytes& data) {
    return Transact(kRegionWrite, WriteOf(region, offset, data));
  }
  static Bytes WriteOf(uint32_t region, uint64_t offset, const Bytes& data) {
    return Bytes{}.U64(offset).U32(region).U32(static_cast<uint32_t>(data.size())).Add(data);
  }
  void Poke(uint32_t region, uint64_t offset, uint8_t value) {
    device_.memory(region)[offset] = std::byte{value};
  }
  uint8_t Peek(uint32_t region, uint64_t offset) {
    return std::to_integer<uint8_t>(device_.memory(region)[offset]);
  }
};

TEST_F(RegionAccessTest, ReadsEverySizeInOneReply) {
  Poke(kBar0, 0x105, 0xa5);
  for (const uint32_t count : {1u, 2u, 3u, 4u, 8u}) {
    const Reply reply = Read(kBar0, 0x105, count);
    ASSERT_THAT(reply, IsReplyOfSize(32 + count));
    EXPECT_EQ(reply.u64(0), 0x105u);
    EXPECT_EQ(reply.u32(8), kBar0);
    EXPECT_EQ(reply.u32(12), count);
    EXPECT_EQ(reply.body[16], 0xa5);
  }
}

// SPDK and Cloud Hypervisor read a reply with one call.
TEST_F(RegionAccessTest, HeaderAndDataLeaveTogether) {
  client_->command(kRegionRead, Bytes{}.U64(0).U32(kConfig).U32(4096));
  Serve();
  EXPECT_EQ(client_->read_once(65536).size(), 32u + 4096u);
}

TEST_F(RegionAccessTest, ReadsTheWholeConfigSpace) {
  Poke(kConfig, 0, 0xf4);
  Poke(kConfig, 4095, 0x77);
  const Reply reply = Read(kConfig, 0, 4096);
  ASSERT_THAT(reply, IsReplyOfSize(32 + 4096));
  EXPECT_EQ(reply.body[16], 0xf4);
  EXPECT_EQ(reply.body[16 + 4095], 0x77);
}

TEST_F(RegionAccessTest, WritesAndEchoesTheRequest) {
  const Reply reply = Write(kBar0, 0x10, Bytes{}.U32(0x44332211));
  ASSERT_THAT(reply, IsReplyOfSize(32)) << "Cloud Hypervisor reads exactly this";
  EXPECT_EQ(reply.u64(0), 0x10u);
  EXPECT_EQ(reply.u32(8), kBar0);
  EXPECT_EQ(reply.u32(12), 4u);
  EXPECT_EQ(Peek(kBar0, 0x10), 0x11);
  EXPECT_EQ(Peek(kBar0, 0x13), 0x44);
  EXPECT_EQ(Peek(kBar0, 0x14), 0);
}

TEST_F(RegionAccessTest, PostedWriteIsDoneWithoutAReply) {
  client_->command(kRegionWrite, WriteOf(kBar0, 0x20, Bytes{}.U8(9)), {}, kNoReply);
  Serve();
  EXPECT_FALSE(client_->receive());
  EXPECT_EQ(Peek(kBar0, 0x20), 9);
}

TEST_F(RegionAccessTest, PipelinedWritesAreDoneBeforeTheReadBehindThem) {
  for (uint8_t value = 1; value <= 3; ++value) {
    client_->command(kRegionWrite, WriteOf(kBar0, 0x30, Bytes{}.U8(value)), {}, kNoReply);
  }
  const uint16_t id = client_->command(kRegionRead, Bytes{}.U64(0x30).U32(kBar0).U32(1));
  Serve();
  const Reply reply = ReceiveReply();
  EXPECT_EQ(reply.id, id);
  ASSERT_THAT(reply, IsReplyOfSize(33));
  EXPECT_EQ(reply.body[16], 3);
  EXPECT_FALSE(client_->receive());
}

TEST_F(RegionAccessTest, CountZeroSucceedsAndTouchesNothing) {
  EXPECT_THAT(Read(kConfig, 0, 0), IsReplyOfSize(32));
  EXPECT_THAT(Write(kConfig, 0, {}), IsReplyOfSize(32));
  EXPECT_TRUE(device_.calls.empty());
}

TEST_F(RegionAccessTest, RefusesRangesOutsideTheRegion) {
  EXPECT_THAT(Read(kConfig, UINT64_MAX, 256), IsErrorReply(EINVAL));
  EXPECT_THAT(Read(kConfig, 4096, 1), IsErrorReply(EINVAL));
  EXPECT_THAT(Read(kConfig, 4093, 4), IsErrorReply(EINVAL));
  EXPECT_THAT(Read(kAbsentBar, 0, 1), IsErrorReply(EINVAL));
  EXPECT_THAT(Read(9, 0, 1), IsErrorReply(EINVAL));
  EXPECT_THAT(Read(0xffffffff, 0, 1), IsErrorReply(EINVAL));
  EXPECT_THAT(Write(kConfig, 4093, Bytes{}.U32(0)), IsErrorReply(EINVAL));
  EXPECT_THAT(Write(kConfig, UINT64_MAX - 1, Bytes{}.U32(0)), IsErrorReply(EINVAL));
  EXPECT_THAT(Write(kAbsentBar, 0, Bytes{}.U8(0)), IsErrorReply(EINVAL));
  EXPECT_THAT(Write(9, 0, Bytes{}.U8(0)), IsErrorReply(EINVAL));
  EXPECT_TRUE(device_.calls.empty());
  EXPECT_THAT(Read(kConfig, 4092, 4), IsReplyOfSize(36));
}

TEST_F(RegionAccessTest, RefusesShortBodiesAndDataThatDoesNotMatchTheCount) {
  EXPECT_THAT(Transact(kRegionRead, Bytes{}.U64(0)), IsErrorReply(EINVAL));
  EXPECT_THAT(Transact(kRegionWrite, Bytes{}.U64(0)), IsErrorReply(EINVAL));
  EXPECT_THAT(Transact(kRegionWrite, Bytes{}.U64(0).U32(kBar0).U32(4).U8(0)), IsErrorReply(EINVAL));
  EXPECT_THAT(Transact(kRegionWrite, Bytes{}.U64(0).U32(kBar0).U32(1).U32(0)),
              IsErrorReply(EINVAL));
  EXPECT_TRUE(device_.calls.empty());
}

TEST_F(RegionAccessTest, RefusesMoreThanOneTransfer) {
  EXPECT_THAT(Read(kBar0, 0, kMegabyte + 8), IsErrorReply(EINVAL));
  EXPECT_THAT(Read(kBar0, 0, 0xffffffff), IsErrorReply(EINVAL));
  ExpectStillServing();
}

// The reply does not fit into the socket's buffer: the server has to wait for its reader.
TEST_F(RegionAccessTest, LargestTransferArrivesInFull) {
  Connect();
  int ends[2];
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
  client_ = std::make_unique<VfioUserClient>(UniqueFd(ends[0]));
  auto server = glue::vfio_user::Server::Create(UniqueFd(ends[1]), &device_, &log_);
  ASSERT_THAT(server, IsOk());
  server_ = std::move(*server);
  ASSERT_EQ(Negotiate().flags, kTypeReply);
  Poke(kBar0, kMegabyte - 1, 0x5a);

  std::optional<Reply> reply;
  client_->command(kRegionRead, Bytes{}.U64(0).U32(kBar0).U32(kMegabyte));
  std::thread reader([&] {
    while (!reply && !client_->is_closed()) reply = client_->receive();
  });
  Serve();
  reader.join();
  ASSERT_TRUE(reply);
  ASSERT_THAT(*reply, IsReplyOfSize(32 + kMegabyte));
  EXPECT_EQ(reply->body.back(), 0x5a);
  EXPECT_EQ(state_, State::kServing);
}

// An access that a driver can make never fails.
TEST_F(RegionAccessTest, ReadOfWriteOnlyRegionIsAllOnes) {
  Poke(kWriteOnlyBar, 0, 0x12);
  const Reply reply = Read(kWriteOnlyBar, 0, 4);
  ASSERT_THAT(reply, IsReplyOfSize(36));
  EXPECT_EQ(reply.u32(16), 0xffffffffu);
  EXPECT_TRUE(device_.calls.empty());
}

TEST_F(RegionAccessTest, WriteToReadOnlyRegionVanishes) {
  EXPECT_THAT(Write(kReadOnlyBar, 0, Bytes{}.U32(1)), IsReplyOfSize(32));
  EXPECT_TRUE(device_.calls.empty());
  EXPECT_EQ(Peek(kReadOnlyBar, 0), 0);
}

}  // namespace
}  // namespace mvgpu::testing
