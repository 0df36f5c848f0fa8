// DEVICE_GET_INFO (libvfio-user test/py/test_device_get_info.py).

#include "tests/conformance/server_fixture.h"

namespace mvgpu::testing {
namespace {

class DeviceGetInfoTest : public NegotiatedServerTest {};

TEST_F(DeviceGetInfoTest, DescribesAPciDeviceThatCanBeReset) {
  for (const uint32_t argsz : {16u, 32u, 4096u}) {
    const Reply reply = Transact(kGetInfo, Bytes{}.U32(argsz).Fill(12));
    ASSERT_THAT(reply, IsReplyOfSize(32)) << "QEMU's buffer; Cloud Hypervisor reads exactly this";
    EXPECT_EQ(reply.u32(0), 16u);
    EXPECT_EQ(reply.u32(4), 3u);
    EXPECT_EQ(reply.u32(8), 9u);
    EXPECT_EQ(reply.u32(12), 5u);
  }
}

TEST_F(DeviceGetInfoTest, AcceptsALongerBody) {
  EXPECT_THAT(Transact(kGetInfo, Bytes{}.U32(32).Fill(28)), IsReplyOfSize(32));
}

TEST_F(DeviceGetInfoTest, RefusesShortBodyAndSmallArgsz) {
  EXPECT_THAT(Transact(kGetInfo, Bytes{}.U32(16).U32(0)), IsErrorReply(EINVAL));
  EXPECT_THAT(Transact(kGetInfo, Bytes{}.U32(8).Fill(12)), IsErrorReply(EINVAL));
  EXPECT_THAT(Transact(kGetInfo, Bytes{}.U32(15).Fill(12)), IsErrorReply(EINVAL));
  ExpectStillServing();
}

}  // namespace
}  // namespace mvgpu::testing
