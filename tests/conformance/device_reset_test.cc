// DEVICE_RESET, and what remains of a client that has gone.

#include "tests/conformance/server_fixture.h"

namespace mvgpu::testing {
namespace {

class DeviceResetTest : public NegotiatedServerTest {
 protected:
  void BindAndMap() {
    ASSERT_THAT(Transact(kSetIrqs, Bytes{}.U32(20).U32(0x24).U32(2).U32(0).U32(1), {NewEventfd()}),
                IsReplyOfSize(16));
    ASSERT_THAT(Transact(kDmaMap, Bytes{}.U32(32).U32(3).U64(0).U64(0x1000).U64(0x1000)),
                IsReplyOfSize(16));
    device_.calls.clear();
  }
  void ExpectReleasedOnce() {
    EXPECT_EQ(device_.count("reset"), 1);
    EXPECT_TRUE(device_.eventfds.empty());
    EXPECT_EQ(device_.container.totals().mappings, 0u);
  }
};

TEST_F(DeviceResetTest, ResetsTheDeviceAndKeepsMapsAndInterrupts) {
  BindAndMap();
  EXPECT_THAT(Transact(kReset, {}), IsReplyOfSize(16));
  EXPECT_THAT(device_.calls, ::testing::ElementsAre("reset"));
  EXPECT_EQ(device_.eventfds.size(), 1u);
  EXPECT_EQ(device_.container.totals().mappings, 1u);
}

TEST_F(DeviceResetTest, ClientThatLeavesIsNoticedAndReleasedOnce) {
  BindAndMap();
  client_->close();
  EXPECT_EQ(Serve(), State::kClientLeft);
  EXPECT_TRUE(device_.calls.empty()) << "the device stands as the client left it, for a last look";
  server_.reset();
  ExpectReleasedOnce();
  // Resources go before the memory that they lie in.
  EXPECT_EQ(device_.calls.back(), "unmap all");
}

TEST_F(DeviceResetTest, CommandsSentBeforeLeavingAreStillDone) {
  client_->command(kRegionWrite, Bytes{}.U64(4).U32(0).U32(1).U8(7), {}, kNoReply);
  client_->close();
  EXPECT_EQ(Serve(), State::kClientLeft);
  EXPECT_EQ(device_.memory(0)[4], std::byte{7});
}

TEST_F(DeviceResetTest, ClientThatLeavesWithoutReadingItsRepliesIsNoError) {
  for (int i = 0; i < 5; ++i) client_->command(kGetInfo, Bytes{}.U32(16).Fill(12));
  client_->close();
  EXPECT_EQ(Serve(), State::kClientLeft) << "before the replies were sent";

  Connect();
  Negotiate();
  for (int i = 0; i < 5; ++i) client_->command(kGetInfo, Bytes{}.U32(16).Fill(12));
  EXPECT_EQ(Serve(), State::kServing);
  client_->close();
  EXPECT_EQ(Serve(), State::kClientLeft) << "after they were sent";
}

TEST_F(DeviceResetTest, ClientThatLeavesInTheMiddleOfAMessageIsReleasedToo) {
  for (const size_t part : {size_t{1}, size_t{15}, size_t{16}, size_t{27}}) {
    Connect();
    Negotiate();
    BindAndMap();
    const Bytes message = MessageOf(1, kGetInfo, 32, 0, Bytes{}.U32(16).Fill(12));
    client_->send_some(message.data(), part, {sent_fds_.back().get()});
    EXPECT_EQ(Serve(), State::kServing);
    client_->close();
    EXPECT_EQ(Serve(), State::kBroken);
    EXPECT_THAT(last_error_, ::testing::HasSubstr("left"));
    ExpectReleasedOnce();
  }
}

TEST_F(DeviceResetTest, NextClientFindsAFreshDevice) {
  BindAndMap();
  client_->close();
  Serve();
  Connect();
  ASSERT_EQ(Negotiate().flags, kTypeReply);
  ExpectReleasedOnce();
  BindAndMap();
  ExpectStillServing();
}

}  // namespace
}  // namespace mvgpu::testing
