// DEVICE_GET_REGION_IO_FDS: we have none (libvfio-user test/py/test_device_get_region_io_fds.py).

#include "tests/conformance/server_fixture.h"

namespace mvgpu::testing {
namespace {

class DeviceGetRegionIoFdsTest : public NegotiatedServerTest {
 protected:
  Reply Get(uint32_t index, uint32_t argsz = 16, uint32_t flags = 0, uint32_t count = 0) {
    return Transact(kGetRegionIoFds, Bytes{}.U32(argsz).U32(flags).U32(index).U32(count));
  }
};

TEST_F(DeviceGetRegionIoFdsTest, OffersNone) {
  for (const uint32_t argsz : {16u, 512u, kMegabyte}) {
    const Reply reply = Get(0, argsz);
    ASSERT_THAT(reply, IsReplyOfSize(32));
    EXPECT_EQ(reply.u32(0), 16u);
    EXPECT_EQ(reply.u32(4), 0u);
    EXPECT_EQ(reply.u32(8), 0u);
    EXPECT_EQ(reply.u32(12), 0u);
  }
}

TEST_F(DeviceGetRegionIoFdsTest, RefusesWhatMakesNoSense) {
  EXPECT_THAT(Transact(kGetRegionIoFds, Bytes{}.U32(16).U32(0)), IsErrorReply(EINVAL));
  EXPECT_THAT(Get(0, 16, 1), IsErrorReply(EINVAL));
  EXPECT_THAT(Get(0, 16, 0, 1), IsErrorReply(EINVAL));
  EXPECT_THAT(Get(0, 15), IsErrorReply(EINVAL));
  EXPECT_THAT(Get(0, kMegabyte + 1), IsErrorReply(EINVAL));
  EXPECT_THAT(Get(3), IsErrorReply(EINVAL)) << "absent region";
  EXPECT_THAT(Get(512), IsErrorReply(EINVAL));
  ExpectStillServing();
}

}  // namespace
}  // namespace mvgpu::testing
