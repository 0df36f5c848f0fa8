// DEVICE_GET_REGION_INFO (libvfio-user test/py/test_device_get_region_info*.py).

#include "tests/conformance/server_fixture.h"

namespace mvgpu::testing {
namespace {

class DeviceGetRegionInfoTest : public NegotiatedServerTest {
 protected:
  Reply Get(uint32_t index, uint32_t argsz = 32) {
    return Transact(kGetRegionInfo, Bytes{}.U32(argsz).U32(0).U32(index).Fill(20));
  }
  void ExpectRegion(const Reply& reply, uint32_t index, uint32_t flags, uint64_t size) {
    // Also when argsz is larger: nothing is there that could fill it.
    ASSERT_THAT(reply, IsReplyOfSize(48));
    EXPECT_EQ(reply.u32(0), 32u);
    EXPECT_EQ(reply.u32(4), flags) << index;
    EXPECT_EQ(reply.u32(8), index);
    EXPECT_EQ(reply.u32(12), 0u) << "no capabilities";
    EXPECT_EQ(reply.u64(16), size) << index;
    EXPECT_EQ(reply.u64(24), 0u);
  }
};

TEST_F(DeviceGetRegionInfoTest, DescribesEveryRegionWithoutMmap) {
  ExpectRegion(Get(0), 0, 3, FakeVfioDevice::kBar0Size);
  ExpectRegion(Get(2), 2, 1, FakeVfioDevice::kBar2Size);
  ExpectRegion(Get(4), 4, 2, FakeVfioDevice::kBar4Size);
  ExpectRegion(Get(7), 7, 3, FakeVfioDevice::kConfigSize);
}

TEST_F(DeviceGetRegionInfoTest, AbsentRegionHasSizeAndFlagsZero) {
  for (const uint32_t index : {1u, 3u, 5u, 6u, 8u}) ExpectRegion(Get(index), index, 0, 0);
}

TEST_F(DeviceGetRegionInfoTest, LargerArgszGetsTheSameReply) {
  ExpectRegion(Get(0, 40), 0, 3, FakeVfioDevice::kBar0Size);
  ExpectRegion(Get(0, 0xffffffff), 0, 3, FakeVfioDevice::kBar0Size);
}

TEST_F(DeviceGetRegionInfoTest, AcceptsTheLongBodyOfSpdk) {
  ExpectRegion(Transact(kGetRegionInfo, Bytes{}.U32(4064).U32(0).U32(7).Fill(4064 - 12)), 7, 3,
               FakeVfioDevice::kConfigSize);
}

TEST_F(DeviceGetRegionInfoTest, RefusesShortBodySmallArgszAndUnknownIndex) {
  EXPECT_THAT(Transact(kGetRegionInfo, Bytes{}.U32(32).U32(0)), IsErrorReply(EINVAL));
  EXPECT_THAT(Get(0, 8), IsErrorReply(EINVAL));
  EXPECT_THAT(Get(9), IsErrorReply(EINVAL));
  EXPECT_THAT(Get(0xffffffff), IsErrorReply(EINVAL));
  EXPECT_THAT(Get(8), IsReplyOfSize(48));
}

}  // namespace
}  // namespace mvgpu::testing
