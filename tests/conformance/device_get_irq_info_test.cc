// DEVICE_GET_IRQ_INFO (libvfio-user test/py/test_device_get_irq_info.py).

#include "tests/conformance/server_fixture.h"

namespace mvgpu::testing {
namespace {

class DeviceGetIrqInfoTest : public NegotiatedServerTest {
 protected:
  Reply Get(uint32_t index, uint32_t argsz = 16) {
    return Transact(kGetIrqInfo, Bytes{}.U32(argsz).U32(0).U32(index).U32(0));
  }
};

TEST_F(DeviceGetIrqInfoTest, DescribesEveryIndex) {
  struct Expected {
    uint32_t index, flags, count;
  };
  for (const Expected& expected :
       {Expected{0, 7, 0}, {1, 0, 0}, {2, 1, 2048}, {3, 1, 1}, {4, 1, 1}}) {
    for (const uint32_t argsz : {16u, 32u}) {
      const Reply reply = Get(expected.index, argsz);
      ASSERT_THAT(reply, IsReplyOfSize(32)) << expected.index;
      EXPECT_EQ(reply.u32(0), 16u);
      EXPECT_EQ(reply.u32(4), expected.flags) << expected.index;
      EXPECT_EQ(reply.u32(8), expected.index);
      EXPECT_EQ(reply.u32(12), expected.count) << expected.index;
    }
  }
}

TEST_F(DeviceGetIrqInfoTest, RefusesShortBodySmallArgszAndUnknownIndex) {
  EXPECT_THAT(Transact(kGetIrqInfo, Bytes{}.U32(16).U32(0)), IsErrorReply(EINVAL));
  EXPECT_THAT(Get(2, 8), IsErrorReply(EINVAL));
  EXPECT_THAT(Get(5), IsErrorReply(EINVAL));
  EXPECT_THAT(Get(0xffffffff), IsErrorReply(EINVAL));
  EXPECT_THAT(Get(4), IsReplyOfSize(32));
}

}  // namespace
}  // namespace mvgpu::testing
