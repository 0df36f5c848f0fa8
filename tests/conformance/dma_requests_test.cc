// DMA_READ and DMA_WRITE, the commands that the server sends: for memory that the client mapped
// without a descriptor.

#include <poll.h>

#include <future>

#include "tests/conformance/server_fixture.h"

namespace mvgpu::testing {
namespace {

using ::testing::HasSubstr;

class DmaRequestsConformanceTest : public NegotiatedServerTest {
 protected:
  glue::vfio_user::DmaRequests* dma_requests() override { return &requests_; }

  void TearDown() override {
    server_.reset();  // a thread that still asks ends
    NegotiatedServerTest::TearDown();
  }

  // On a thread of its own, as a device does it.
  std::future<Result<std::string>> Read(uint64_t iova, size_t size) {
    return std::async(std::launch::async, [this, iova, size]() -> Result<std::string> {
      std::string bytes(size, 0);
      MVGPU_RETURN_IF_ERROR(requests_.read(Iova(iova), std::as_writable_bytes(std::span(bytes))));
      return bytes;
    });
  }
  std::future<Result<void>> Write(uint64_t iova, std::string bytes) {
    return std::async(std::launch::async, [this, iova, bytes] {
      return requests_.write(Iova(iova), std::as_bytes(std::span(bytes)));
    });
  }
  // Waits for the next message from the server.
  Reply Next() {
    for (int i = 0; i < 200; ++i) {
      if (auto message = client_->receive()) return *message;
      pollfd poll_fd{client_->fd(), POLLIN, 0};
      poll(&poll_fd, 1, 100);
    }
    ADD_FAILURE() << "the server sends nothing";
    return {};
  }
  static void ExpectCommand(const Reply& command, uint16_t number, uint64_t iova, uint64_t count) {
    EXPECT_EQ(command.command, number);
    EXPECT_EQ(command.flags, 0u) << "a command that wants a reply";
    EXPECT_EQ(command.error, 0u);
    EXPECT_EQ(command.u64(0), iova);
    EXPECT_EQ(command.u64(8), count) << "64 bits";
    EXPECT_EQ(command.body.size(), 16 + (number == kDmaWrite ? count : 0));
  }

  glue::vfio_user::DmaRequests requests_{std::chrono::seconds(20)};
};

TEST_F(DmaRequestsConformanceTest, ReadIsAnsweredWithTheRequestAndTheData) {
  auto read = Read(0x1234'5678'9000, 5);
  const Reply command = Next();
  ExpectCommand(command, kDmaRead, 0x1234'5678'9000, 5);
  client_->answer(command, Bytes{}.Text("hello"));
  Serve();
  EXPECT_THAT(read.get(), IsOkAndHolds("hello"));
  EXPECT_EQ(client_->receive(), std::nullopt) << "an answer is not answered";
}

TEST_F(DmaRequestsConformanceTest, WriteCarriesTheDataAndFollowsARead) {
  auto write = Write(0x8000, "data");
  const Reply probe = Next();
  ExpectCommand(probe, kDmaRead, 0x8000, 1);
  client_->answer(probe, Bytes{}.U8(0));
  Serve();
  const Reply command = Next();
  ExpectCommand(command, kDmaWrite, 0x8000, 4);
  EXPECT_EQ(std::string(command.body.begin() + 16, command.body.end()), "data");
  client_->answer(command);
  Serve();
  EXPECT_THAT(write.get(), IsOk());
}

// QEMU answers nothing of ours while it waits for a reply of its own.
TEST_F(DmaRequestsConformanceTest, ClientsOwnCommandsAreServedWhileItOwesAnAnswer) {
  auto read = Read(0x8000, 3);
  const Reply command = Next();
  for (int i = 0; i < 3; ++i) ExpectStillServing();
  EXPECT_THAT(Transact(kDmaMap, Bytes{}.U32(32).U32(3).U64(0).U64(0x1000).U64(0x1000)),
              IsReplyOfSize(16));
  client_->command(kGetInfo, Bytes{}.U32(16).Fill(12));
  client_->answer(command, Bytes{}.Text("abc"));
  client_->command(kGetInfo, Bytes{}.U32(16).Fill(12));
  Serve();
  EXPECT_THAT(ReceiveReply(), IsReplyOfSize(32));
  EXPECT_THAT(ReceiveReply(), IsReplyOfSize(32));
  EXPECT_THAT(read.get(), IsOkAndHolds("abc"));
}

TEST_F(DmaRequestsConformanceTest, AnswerMayUseTheIdOfACommandOfTheClients) {
  auto read = Read(0x8000, 1);
  const Reply command = Next();
  client_->send(MessageOf(command.id, kGetInfo, 32, 0, Bytes{}.U32(16).Fill(12)));
  Serve();
  EXPECT_THAT(ReceiveReply(), IsReplyOfSize(32));
  client_->answer(command, Bytes{}.U8('x'));
  Serve();
  EXPECT_THAT(read.get(), IsOkAndHolds("x"));
}

TEST_F(DmaRequestsConformanceTest, ErrorReachesWhoeverAsked) {
  auto read = Read(0x8000, 4);
  client_->refuse(Next(), ENODEV);
  Serve();
  const auto result = read.get();
  EXPECT_THAT(result, FailsWith(ErrorCode::kNotReachable));
  EXPECT_THAT(result.error().message(), HasSubstr("iova 0x8000"));
  ExpectStillServing();
}

TEST_F(DmaRequestsConformanceTest, ReplyThatNobodyAskedForIsRefused) {
  for (const uint16_t command : {kDmaRead, kRegionRead}) {
    client_->send(MessageOf(77, command, 33, kTypeReply, Bytes{}.Fill(17)));
    Serve();
    EXPECT_THAT(ReceiveReply(), IsErrorReply(EINVAL));
  }
  ExpectStillServing();
}

TEST_F(DmaRequestsConformanceTest, TransfersAreCutToWhatTheClientTakes) {
  Connect();
  ASSERT_EQ(
      Transact(kVersion,
               Bytes{}.U16(0).U16(1).Text(R"({"capabilities":{"max_data_xfer_size":4096}})").U8(0))
          .error,
      0u);
  auto read = Read(0x10000, 5000);
  const Reply first = Next();
  ExpectCommand(first, kDmaRead, 0x10000, 4096);
  client_->answer(first, Bytes{}.Fill(4096, 'a'));
  Serve();
  const Reply second = Next();
  ExpectCommand(second, kDmaRead, 0x11000, 904);
  client_->answer(second, Bytes{}.Fill(904, 'b'));
  Serve();
  EXPECT_THAT(read.get(), IsOkAndHolds(std::string(4096, 'a') + std::string(904, 'b')));
}

TEST_F(DmaRequestsConformanceTest, ClientThatLeavesOwesNothing) {
  auto read = Read(0x8000, 4);
  Next();
  client_->close();
  EXPECT_EQ(Serve(), State::kClientLeft);
  server_.reset();
  EXPECT_THAT(read.get(), FailsWith(ErrorCode::kProtocol));
}

TEST_F(DmaRequestsConformanceTest, NothingIsAskedBeforeTheVersionExchange) {
  Connect();
  EXPECT_THAT(Read(0x8000, 4).get(), FailsWith(ErrorCode::kProtocol));
  EXPECT_EQ(client_->receive(), std::nullopt);
}

// The client's socket takes nothing: our command is cut off, and what follows it would make no
// sense.
TEST_F(DmaRequestsConformanceTest, CommandThatIsCutOffEndsTheConnection) {
  const int room = 1;
  setsockopt(server_->fd(), SOL_SOCKET, SO_SNDBUF, &room, sizeof(room));
  auto probe = Read(0x8000, 1);
  client_->answer(Next(), Bytes{}.U8(0));
  Serve();
  ASSERT_THAT(probe.get(), IsOkAndHolds(std::string(1, 0)));
  EXPECT_THAT(Write(0x8000, std::string(60000, 'x')).get(), FailsWith(ErrorCode::kProtocol));
  EXPECT_NE(Serve(), State::kServing);
}

}  // namespace
}  // namespace mvgpu::testing
