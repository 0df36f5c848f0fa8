// DMA_MAP (libvfio-user test/py/test_dma_map.py), with a real container behind it.

#include "tests/conformance/server_fixture.h"
#include "tests/fakes/guest_ram.h"

namespace mvgpu::testing {
namespace {

constexpr uint32_t kRead = 1, kWrite = 2, kMustMmap = 4, kFileIo = 8;

class DmaMapTest : public NegotiatedServerTest {
 protected:
  Reply Map(uint64_t iova, uint64_t size, const std::vector<int>& fds,
            uint32_t flags = kRead | kWrite, uint64_t offset = 0) {
    return Transact(kDmaMap, Bytes{}.U32(32).U32(flags).U64(offset).U64(iova).U64(size), fds);
  }
};

TEST_F(DmaMapTest, MapsAFileWithItsOffsetAndAccess) {
  GuestRam ram(0x4000);
  EXPECT_THAT(Map(0x10000, 0x2000, {ram.fd()}, kRead | kWrite, 0x1000), IsReplyOfSize(16));
  EXPECT_THAT(Map(0x20000, 0x1000, {ram.fd()}, kRead), IsReplyOfSize(16));
  EXPECT_THAT(Map(0x30000, 0x1000, {ram.fd()}, kWrite), IsReplyOfSize(16));
  const auto mappings = device_.container.mappings();
  ASSERT_EQ(mappings.size(), 3u);
  EXPECT_EQ(mappings[0].iova.start(), Iova(0x10000));
  EXPECT_EQ(mappings[0].iova.size(), 0x2000u);
  EXPECT_EQ(mappings[0].file_offset, 0x1000u);
  EXPECT_EQ(mappings[0].access, domain::Access::kReadWrite);
  EXPECT_EQ(mappings[1].access, domain::Access::kRead);
  EXPECT_EQ(mappings[2].access, domain::Access::kWrite);
  EXPECT_EQ(device_.container.totals().files, 1u);
}

TEST_F(DmaMapTest, MapsWithoutAFile) {
  EXPECT_THAT(Map(0xc0000, 0x1000, {}, kRead), IsReplyOfSize(16));
  ASSERT_EQ(device_.container.mappings().size(), 1u);
  EXPECT_EQ(device_.container.mappings()[0].file, nullptr);
}

TEST_F(DmaMapTest, AcceptsTheFileHintsOfLibvfioUserOnlyWithAFile) {
  GuestRam ram(0x2000);
  EXPECT_THAT(Map(0x1000, 0x1000, {}, kRead | kMustMmap), IsErrorReply(EINVAL));
  EXPECT_THAT(Map(0x1000, 0x1000, {}, kRead | kFileIo), IsErrorReply(EINVAL));
  EXPECT_THAT(Map(0x1000, 0x1000, {ram.fd()}, kRead | kMustMmap), IsReplyOfSize(16));
  EXPECT_THAT(Map(0x2000, 0x1000, {ram.fd()}, kRead | kFileIo, 0x1000), IsReplyOfSize(16));
}

TEST_F(DmaMapTest, RefusesShortBodySmallArgszAndUnknownFlags) {
  EXPECT_THAT(Transact(kDmaMap, Bytes{}.U32(32).U32(3)), IsErrorReply(EINVAL));
  EXPECT_THAT(Transact(kDmaMap, Bytes{}.U32(31).U32(3).U64(0).U64(0x1000).U64(0x1000)),
              IsErrorReply(EINVAL));
  EXPECT_THAT(Map(0x1000, 0x1000, {}, 0), IsErrorReply(EINVAL)) << "neither read nor write";
  EXPECT_THAT(Map(0x1000, 0x1000, {}, kRead | 0x10), IsErrorReply(EINVAL));
  EXPECT_THAT(Map(0x1000, 0x1000, {}, 0x80000001), IsErrorReply(EINVAL));
  EXPECT_TRUE(device_.calls.empty());
  EXPECT_THAT(Map(0x1000, 0x1000, {}, kRead), IsReplyOfSize(16));
}

TEST_F(DmaMapTest, RefusesASecondDescriptorAndClosesBoth) {
  GuestRam ram(0x1000);
  const size_t before = OpenFds();
  EXPECT_THAT(Map(0x1000, 0x1000, {ram.fd(), ram.fd()}), IsErrorReply(EINVAL));
  EXPECT_EQ(OpenFds(), before);
  EXPECT_THAT(Map(0x1000, 0x1000, {ram.fd()}), IsReplyOfSize(16));
}

TEST_F(DmaMapTest, PassesTheContainersRefusalOn) {
  GuestRam ram(0x4000);
  EXPECT_THAT(Map(0x10000, 0x2000, {ram.fd()}), IsReplyOfSize(16));
  EXPECT_THAT(Map(0x11000, 0x2000, {ram.fd()}), IsErrorReply(EEXIST));
  EXPECT_THAT(Map(0x10000, 0x2000, {ram.fd()}), IsReplyOfSize(16)) << "identical map again";
  EXPECT_THAT(Map(0x20001, 0x1000, {ram.fd()}), IsErrorReply(EINVAL));
  EXPECT_THAT(Map(0x20000, 0, {ram.fd()}), IsErrorReply(EINVAL));
  EXPECT_THAT(Map(0xfffffffffffff000, 0x2000, {ram.fd()}), IsErrorReply(EINVAL));
  EXPECT_EQ(device_.container.totals().mappings, 1u);
  ExpectStillServing();
}

TEST_F(DmaMapTest, RefusesADescriptorThatIsNoMemory) {
  const int fd = NewEventfd();
  const size_t before = OpenFds();
  EXPECT_EQ(Map(0x1000, 0x1000, {fd}).flags, kErrorReply);
  EXPECT_EQ(OpenFds(), before);
  ExpectStillServing();
}

TEST_F(DmaMapTest, SameFileInHundredsOfMapsCostsNoDescriptorEach) {
  GuestRam ram(256 * 0x1000);
  const size_t before = OpenFds();
  for (uint64_t page = 0; page < 256; ++page) {
    // Every second page, as a vIOMMU does it.
    ASSERT_THAT(Map(page * 0x2000, 0x1000, {ram.fd()}, kRead, page * 0x1000), IsReplyOfSize(16));
  }
  EXPECT_LE(OpenFds(), before + 1);
  EXPECT_EQ(device_.container.totals().mappings, 256u);
}

TEST_F(DmaMapTest, MapsEndWithTheConnection) {
  GuestRam ram(0x1000);
  EXPECT_THAT(Map(0x1000, 0x1000, {ram.fd()}), IsReplyOfSize(16));
  Disconnect();
  EXPECT_EQ(device_.container.totals().mappings, 0u);
}

}  // namespace
}  // namespace mvgpu::testing
