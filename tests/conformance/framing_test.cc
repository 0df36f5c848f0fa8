// Bytes arrive as the socket likes: in pieces, in bursts, too slowly, or not at all.

#include "tests/conformance/server_fixture.h"

namespace mvgpu::testing {
namespace {

class FramingTest : public NegotiatedServerTest {
 protected:
  static Bytes GetInfo(uint16_t id) {
    return MessageOf(id, kGetInfo, 32, 0, Bytes{}.U32(16).Fill(12));
  }
};

TEST_F(FramingTest, MessageInSingleBytesIsUnderstoodAtTheLastOne) {
  const Bytes message = GetInfo(5);
  for (size_t i = 0; i < message.size(); ++i) {
    EXPECT_FALSE(client_->receive());
    ASSERT_EQ(client_->send_some(message.data() + i, 1), 1u);
    ASSERT_EQ(Serve(), State::kServing);
  }
  const Reply reply = ReceiveReply();
  EXPECT_THAT(reply, IsReplyOfSize(32));
  EXPECT_EQ(reply.id, 5);
}

TEST_F(FramingTest, DescriptorsOfASplitHeaderArriveWithItsFirstByte) {
  const int fd = NewEventfd();
  const Bytes message =
      MessageOf(5, kSetIrqs, 36, 0, Bytes{}.U32(20).U32(0x24).U32(2).U32(3).U32(2));
  ASSERT_EQ(client_->send_some(message.data(), 1, {fd, fd}), 1u);
  Serve();
  for (size_t i = 1; i < message.size(); ++i) {
    ASSERT_EQ(client_->send_some(message.data() + i, 1), 1u);
    Serve();
  }
  EXPECT_THAT(ReceiveReply(), IsReplyOfSize(16));
  EXPECT_EQ(device_.eventfds.size(), 2u);
}

TEST_F(FramingTest, DescriptorsOnEveryByteOfAHeaderAreCountedTogether) {
  const std::vector<int> fds(3, NewEventfd());
  const size_t before = OpenFds();
  const Bytes message = GetInfo(5);
  for (size_t i = 0; i < 16; ++i) {
    ASSERT_EQ(client_->send_some(message.data() + i, 1, fds), 1u);
    Serve();
    EXPECT_LE(OpenFds(), before + 16);
  }
  ASSERT_EQ(client_->send_some(message.data() + 16, 16), 16u);
  Serve();
  EXPECT_THAT(ReceiveReply(), IsErrorReply(EINVAL));
  EXPECT_EQ(OpenFds(), before);
  ExpectStillServing();
}

TEST_F(FramingTest, DescriptorsOnTheBodyAreDropped) {
  const int fd = NewEventfd();
  const size_t before = OpenFds();
  const Bytes message = GetInfo(5);
  ASSERT_EQ(client_->send_some(message.data(), 16), 16u);
  ASSERT_EQ(client_->send_some(message.data() + 16, 16, {fd}), 16u);
  Serve();
  EXPECT_THAT(ReceiveReply(), IsReplyOfSize(32));
  EXPECT_EQ(OpenFds(), before);
}

TEST_F(FramingTest, DescriptorsStayWithTheirMessageInABurst) {
  const int first = NewEventfd(10);
  const int second = NewEventfd(20);
  const auto bind = [](uint16_t id, uint32_t vector) {
    return MessageOf(id, kSetIrqs, 36, 0, Bytes{}.U32(20).U32(0x24).U32(2).U32(vector).U32(1));
  };
  client_->send(GetInfo(1));
  client_->send(bind(2, 0), {first});
  client_->send(GetInfo(3));
  client_->send(bind(4, 1), {second});
  Serve();
  for (uint16_t id = 1; id <= 4; ++id) {
    const Reply reply = ReceiveReply();
    EXPECT_EQ(reply.id, id);
    EXPECT_EQ(reply.flags, kTypeReply);
  }
  device_.fire(2, 1);
  EXPECT_EQ(Counter(first), 10u);
  EXPECT_EQ(Counter(second), 21u);
}

TEST_F(FramingTest, BurstInOneWriteIsAnsweredInOrder) {
  Bytes burst;
  for (uint16_t id = 0; id < 100; ++id) burst.Add(GetInfo(id));
  burst.Add(MessageOf(100, 999, 17, 0, Bytes{}.U8(0)));
  ASSERT_TRUE(client_->send(burst));
  Serve();
  for (uint16_t id = 0; id < 100; ++id) {
    const Reply reply = ReceiveReply();
    EXPECT_THAT(reply, IsReplyOfSize(32));
    EXPECT_EQ(reply.id, id);
  }
  EXPECT_THAT(ReceiveReply(), IsErrorReply(EINVAL));
}

// A client that never pauses leaves the event loop its turn.
TEST_F(FramingTest, OneCallHandlesABoundedNumberOfMessages) {
  Bytes burst;
  constexpr uint16_t kMessages = 600;
  const Bytes write = Bytes{}.U64(0).U32(0).U32(1).U8(1);
  for (uint16_t id = 0; id < kMessages; ++id) {
    burst.Add(MessageOf(id, kRegionWrite, 33, kNoReply, write));
  }
  ASSERT_TRUE(client_->send(burst));
  Serve();
  EXPECT_LT(device_.calls.size(), kMessages);
  EXPECT_GT(device_.calls.size(), 0u);
  Serve();
  Serve();
  EXPECT_EQ(device_.calls.size(), kMessages);
}

TEST_F(FramingTest, StalledClientBlocksNobody) {
  const Bytes message = GetInfo(1);
  client_->send_some(message.data(), 20);
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < 100; ++i) ASSERT_EQ(Serve(), State::kServing);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(2));
  client_->send_some(message.data() + 20, message.size() - 20);
  Serve();
  EXPECT_THAT(ReceiveReply(), IsReplyOfSize(32));
}

TEST_F(FramingTest, ClientThatNeverReadsIsDropped) {
  // One reply of a megabyte does not fit into the buffer of the socket; 50 ms is this server's
  // patience.
  client_->command(kRegionRead, Bytes{}.U64(0).U32(0).U32(kMegabyte));
  EXPECT_EQ(Serve(), State::kBroken);
  EXPECT_THAT(last_error_, ::testing::HasSubstr("did not read its reply within 50 ms"));
}

TEST_F(FramingTest, OnlyAUnixStreamSocketIsServed) {
  int ends[2];
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0, ends), 0);
  const UniqueFd other_end(ends[0]);
  EXPECT_THAT(glue::vfio_user::Server::Create(UniqueFd(ends[1]), &device_, &log_),
              FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(glue::vfio_user::Server::Create(UniqueFd(dup(NewEventfd())), &device_, &log_),
              FailsWith(ErrorCode::kSystem));
}

}  // namespace
}  // namespace mvgpu::testing
