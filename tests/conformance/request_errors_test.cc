// Frames that make no sense (libvfio-user test/py/test_request_errors.py).

#include <array>

#include "tests/conformance/server_fixture.h"

namespace mvgpu::testing {
namespace {

class RequestErrorsTest : public NegotiatedServerTest {};

TEST_F(RequestErrorsTest, SizeBelowTheHeaderIsRefusedAndTheStreamStaysInStep) {
  EXPECT_THAT(TransactHeader(kSetIrqs, 15), IsErrorReply(EINVAL));
  EXPECT_THAT(TransactHeader(kSetIrqs, 0), IsErrorReply(EINVAL));
  ExpectStillServing();
}

TEST_F(RequestErrorsTest, SizeBeyondTheLimitIsRefusedAndEndsTheConnection) {
  EXPECT_THAT(TransactHeader(kSetIrqs, kMegabyte + 33), IsErrorReply(EINVAL));
  EXPECT_EQ(state_, State::kBroken);
  EXPECT_THAT(last_error_, ::testing::HasSubstr("1048609 bytes"));
}

TEST_F(RequestErrorsTest, LargestMessageIsReadInFull) {
  const Bytes message =
      MessageOf(1, 999, kMegabyte + 32, 0, Bytes{}.Fill(kMegabyte + 32 - kHeaderSize));
  size_t sent = 0;
  while (sent < message.size()) {
    sent += client_->send_some(message.data() + sent, message.size() - sent);
    ASSERT_EQ(Serve(), State::kServing);
  }
  EXPECT_THAT(ReceiveReply(), IsErrorReply(EINVAL));
  ExpectStillServing();
}

TEST_F(RequestErrorsTest, UnsolicitedReplyIsRefused) {
  EXPECT_THAT(TransactHeader(kGetInfo, 16, kTypeReply), IsErrorReply(EINVAL));
  EXPECT_THAT(TransactHeader(kGetInfo, 16, 0xf), IsErrorReply(EINVAL));
  ExpectStillServing();
}

TEST_F(RequestErrorsTest, UnknownCommandIsRefusedWithItsNumberEchoed) {
  for (const uint16_t command : {uint16_t{0}, uint16_t{19}, uint16_t{999}, uint16_t{65535}}) {
    const Reply reply = Transact(command, Bytes{}.U8(0));
    EXPECT_THAT(reply, IsErrorReply(EINVAL));
    EXPECT_EQ(reply.command, command);
  }
  ExpectStillServing();
}

TEST_F(RequestErrorsTest, CommandsOfTheServerAndUnsupportedOnesAreRefused) {
  // dma_read, dma_write, dirty_pages, mig_data_read, mig_data_write
  for (const auto command : std::to_array<uint16_t>({11, 12, 14, 17, 18})) {
    EXPECT_THAT(Transact(command, Bytes{}.U32(32).Fill(60)), IsErrorReply(EINVAL)) << command;
  }
  ExpectStillServing();
}

// EINVAL is what QEMU takes for "this feature is not there".
TEST_F(RequestErrorsTest, EveryDeviceFeatureIsRefused) {
  for (uint32_t feature = 0; feature < 12; ++feature) {
    for (const uint32_t operation : {1u << 16, 1u << 17, 1u << 18, 7u << 16}) {
      EXPECT_THAT(Transact(kDeviceFeature, Bytes{}.U32(24).U32(feature | operation).Fill(16)),
                  IsErrorReply(EINVAL));
    }
  }
  EXPECT_THAT(Transact(kDeviceFeature, Bytes{}.U32(2)), IsErrorReply(EINVAL));
  ExpectStillServing();
}

TEST_F(RequestErrorsTest, EveryCommandButResetNeedsAPayload) {
  for (uint16_t command = 1; command <= 18; ++command) {
    if (command == kReset) continue;
    EXPECT_THAT(TransactHeader(command, 16), IsErrorReply(EINVAL)) << command;
  }
  EXPECT_THAT(TransactHeader(kReset, 16), IsReplyOfSize(16));
}

TEST_F(RequestErrorsTest, ErrorIsReportedInOneLineWithItsValues) {
  Transact(kGetRegionInfo, Bytes{}.U32(32).U32(0).U32(9).Fill(20));
  ASSERT_EQ(log_.lines.size(), 1u);
  EXPECT_THAT(log_.lines[0], ::testing::AllOf(::testing::HasSubstr("get_region_info"),
                                              ::testing::HasSubstr("region index is 9"),
                                              ::testing::Not(::testing::HasSubstr("\n"))));
}

TEST_F(RequestErrorsTest, CommandThatWantsNoReplyGetsNoneNotEvenAnError) {
  client_->command(kGetInfo, Bytes{}.U32(16).Fill(12), {}, kNoReply);
  client_->command(999, Bytes{}.U32(0), {}, kNoReply);
  client_->command(kRegionWrite, Bytes{}.U64(0).U32(77).U32(4).U32(0), {}, kNoReply);
  client_->command(kSetIrqs, {}, {}, kNoReply | kTypeReply);
  client_->send(MessageOf(1, kReset, 3, kNoReply, {}));  // even with a bad size
  Serve();
  EXPECT_FALSE(client_->receive());
  EXPECT_EQ(log_.lines.size(), 4u) << "they are reported, though";
  ExpectStillServing();
}

TEST_F(RequestErrorsTest, RefusedRequestClosesItsDescriptors) {
  const int fd = NewEventfd();
  const size_t before = OpenFds();
  // bools + trigger with two descriptors
  EXPECT_THAT(
      Transact(kSetIrqs, Bytes{}.U32(22).U32(0x22).U32(2).U32(0).U32(2).U8(0).U8(0), {fd, fd}),
      IsErrorReply(EINVAL));
  EXPECT_EQ(OpenFds(), before);
}

TEST_F(RequestErrorsTest, CommandThatNeedsNoDescriptorClosesIt) {
  const int fd = NewEventfd();
  const size_t before = OpenFds();
  EXPECT_THAT(Transact(kGetInfo, Bytes{}.U32(16).Fill(12), {fd, fd, fd}), IsReplyOfSize(32));
  // SPDK attaches one to DMA_UNMAP.
  EXPECT_THAT(Transact(kDmaUnmap, Bytes{}.U32(24).U32(0).U64(0).U64(0x1000), {fd}),
              IsReplyOfSize(40));
  EXPECT_EQ(OpenFds(), before);
}

TEST_F(RequestErrorsTest, SixteenDescriptorsAreTakenAndSeventeenRefused) {
  const std::vector<int> sixteen(16, NewEventfd());
  const std::vector<int> seventeen(17, sixteen[0]);
  const std::vector<int> most(253, sixteen[0]);  // SCM_MAX_FD
  const auto bind = [](uint32_t count) {
    return Bytes{}.U32(20).U32(0x24).U32(2).U32(0).U32(count);
  };
  const size_t before = OpenFds();
  EXPECT_THAT(Transact(kSetIrqs, bind(17), seventeen), IsErrorReply(EINVAL));
  EXPECT_THAT(Transact(kSetIrqs, bind(253), most), IsErrorReply(EINVAL));
  // The first sixteen are not taken for all of them.
  EXPECT_THAT(Transact(kSetIrqs, bind(16), seventeen), IsErrorReply(EINVAL));
  EXPECT_TRUE(device_.calls.empty());
  EXPECT_EQ(OpenFds(), before);
  EXPECT_THAT(Transact(kSetIrqs, bind(16), sixteen), IsReplyOfSize(16));
  EXPECT_EQ(device_.eventfds.size(), 16u);
  ExpectStillServing();
}

}  // namespace
}  // namespace mvgpu::testing
