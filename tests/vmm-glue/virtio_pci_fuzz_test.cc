// Random register accesses and random rings: whatever a guest does, the device answers, and a reset
// heals. The seeds are fixed, so that a failure comes again.

#include <random>

#include "tests/vmm-glue/virtio_fixture.h"

namespace mvgpu::glue {
namespace {

using testing::VringDesc;

class VirtioPciFuzzTest : public VirtioPciTest, public ::testing::WithParamInterface<uint64_t> {
 protected:
  uint64_t Random() { return random_(); }
  uint64_t Below(uint64_t limit) { return Random() % limit; }
  bool OneIn(uint64_t n) { return Below(n) == 0; }

  std::vector<std::byte> RandomBytes(size_t size) {
    std::vector<std::byte> bytes(size);
    for (std::byte& byte : bytes) byte = static_cast<std::byte>(OneIn(3) ? Below(16) : Random());
    return bytes;
  }
  void RandomAccess() {
    static constexpr uint32_t kRegions[] = {1, 4, 4, 4, kRegionConfig};
    const uint32_t region = kRegions[Below(std::size(kRegions))];
    const uint64_t size = device_->region_info(region).size;
    uint64_t count = OneIn(50) ? 1 + Below(size) : uint64_t{1} << Below(4);
    // Registers crowd at the start of each page.
    uint64_t offset = region == 4 ? 0x1000 * Below(4) + Below(64) : Below(size);
    if (OneIn(20)) offset = Below(size);
    count = std::min(count, size - offset);
    std::vector<std::byte> data = RandomBytes(count);
    if (OneIn(3)) {
      device_->region_read(region, offset, data);
    } else {
      device_->region_write(region, offset, data);
    }
  }
  // A descriptor that is plausible in most of its fields.
  VringDesc RandomDescriptor() {
    VringDesc descriptor;
    descriptor.addr = OneIn(20) ? Random() : kIovaBase + Below(kRamSize);
    descriptor.len = static_cast<uint32_t>(OneIn(20)  ? Random()
                                           : OneIn(4) ? 16 * (1 + Below(8))
                                                      : 1 + Below(300));
    descriptor.flags = static_cast<uint16_t>(OneIn(30) ? Random() : Below(8));
    descriptor.next = static_cast<uint16_t>(OneIn(30) ? Random() : Below(64));
    return descriptor;
  }

  std::mt19937_64 random_{GetParam()};
};

TEST_P(VirtioPciFuzzTest, RandomAccessesNeverBreakTheDevice) {
  for (int i = 0; i < 20000; ++i) {
    RandomAccess();
    if (OneIn(4)) ProcessOne(static_cast<uint16_t>(Below(3)));
    if (OneIn(200)) StartDriver(kAllFeatures);
    if (OneIn(500)) device_->reset();
  }
  device_->reset();
  ASSERT_TRUE(driver_->probe()) << "the capabilities are where they were";
  for (auto& event : events_) event.take();
  ExpectRecovers(kAllFeatures);
}

TEST_P(VirtioPciFuzzTest, RandomRingsEndInAnswersInNeedsResetOrInWaiting) {
  int answered = 0;
  int refused = 0;
  for (int round = 0; round < 1500; ++round) {
    StartDriver(OneIn(2) ? kAllFeatures : kNoEventIdx);
    errors_.clear();
    waiting_.clear();
    for (uint16_t i = 0; i < 64; ++i) queue_.put_descriptor(i, RandomDescriptor());
    // Tables for the indirect ones among them.
    for (int i = 0; i < 64; ++i)
      memory_.put(kIovaBase + 16 * Below(kRamSize / 16), RandomDescriptor());
    for (int i = 0; i < 8; ++i) {
      queue_.make_available(static_cast<uint16_t>(OneIn(20) ? Random() : Below(64)));
    }
    while (ProcessOne(0)) ++answered;
    EXPECT_EQ(errors_.empty(), (driver_->status() & 0x40) == 0);
    refused += errors_.empty() && waiting_.empty() ? 0 : 1;
    if (errors_.empty() && waiting_.empty()) {
      EXPECT_EQ(queue_.used_index(), 8);
    }
  }
  // Both ways were taken, or the descriptors above are not random enough.
  EXPECT_GT(answered, 500);
  EXPECT_GT(refused, 500);
  for (auto& event : events_) event.take();
  ExpectRecovers(kAllFeatures);
}

INSTANTIATE_TEST_SUITE_P(Seeds, VirtioPciFuzzTest, ::testing::Values(1, 2, 3));

}  // namespace
}  // namespace mvgpu::glue
