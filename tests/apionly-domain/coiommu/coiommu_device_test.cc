#include "apionly-domain/coiommu/coiommu_device.h"

#include "tests/apionly-domain/coiommu/coiommu_fixture.h"

namespace mvgpu::domain {
namespace {

using ::testing::ElementsAre;

class CoiommuDeviceTest : public CoiommuTest {
 protected:
  void PutBatch(uint16_t device, uint64_t count, const std::vector<uint64_t>& frames) {
    ram_.put(kBatch, uint64_t{device});
    ram_.put(kBatch + 8, count);
    for (size_t i = 0; i < frames.size(); ++i) ram_.put(kBatch + 16 + i * 8, frames[i]);
    for (const uint64_t frame : frames) {
      if (frame < kFrames) guest_->prepare(frame, 1);
    }
  }
};

TEST_F(CoiommuDeviceTest, TheRequestWordsOfTheSeed) {
  ASSERT_THAT(container_.map(ram_.map_request(0x1234'5000, 0x5000, 0x1000)), testing::IsOk());
  guest_->prepare(0x12345, 1);
  Ask(0x0000'0001'2345'0028);
  EXPECT_EQ(Shown(), (std::set<uint64_t>{0x12345}));
  ASSERT_THAT(container_.map(ram_.map_request(0x765'4000, kBatch, 0x1000)), testing::IsOk());
  PutBatch(0x28, 2, {7, 9});
  Ask(0x8000'0000'0765'4000);
  EXPECT_EQ(Shown(), (std::set<uint64_t>{7, 9, 0x12345}));
  EXPECT_EQ(device_->counters().pages, 3u);
}

TEST_F(CoiommuDeviceTest, ABatchIsOneNotification) {
  std::vector<uint64_t> frames;
  for (uint64_t frame = 3; frame < 703; ++frame) frames.push_back(frame);
  EXPECT_TRUE(guest_->map(frames));
  EXPECT_EQ(guest_->notifications(), 1u);
  EXPECT_EQ(Shown().size(), 700u);
  EXPECT_EQ(device_->counters().requests, 1u);
  EXPECT_EQ(device_->counters().pages, 700u);
  guest_->unmap(frames);
  EXPECT_TRUE(guest_->map(frames));
  EXPECT_EQ(guest_->notifications(), 1u);
}

TEST_F(CoiommuDeviceTest, OnePageThatCannotBePinnedFailsTheWholeMap) {
  const std::vector<uint64_t> frames{3, 0x700, 5};
  EXPECT_FALSE(guest_->map(frames));
  EXPECT_EQ(Word(3), 0xc000'0000u);
  EXPECT_EQ(Word(0x700), 0x4000'0000u);
  EXPECT_EQ(Word(5), 0xc000'0000u);
}

TEST_F(CoiommuDeviceTest, TheTopologyListsTheDevices) {
  EXPECT_THAT(device_->topology(), ElementsAre(2, 0x28, 0x30));
}

TEST_F(CoiommuDeviceTest, OtherDevicesAreNotServed) {
  guest_->prepare(5, 1);
  Ask(5 << 16 | 0x29);
  PutBatch(0x29, 1, {5});
  Ask(uint64_t{1} << 63 | kBatch);
  EXPECT_TRUE(Shown().empty());
  EXPECT_EQ(device_->counters().bad_requests, 2u);
  Ask(5 << 16 | 0x30, 3);
  EXPECT_EQ(Shown(), (std::set<uint64_t>{5}));
}

TEST_F(CoiommuDeviceTest, BatchesThatAreTooLargeOrNotInMemoryAreRefused) {
  PutBatch(0x28, (1 << 16) + 1, {5});
  Ask(uint64_t{1} << 63 | kBatch);
  PutBatch(0x28, UINT64_MAX, {5});
  Ask(uint64_t{1} << 63 | kBatch);
  Ask(uint64_t{1} << 63 | 0x4000'0000);
  Ask(UINT64_MAX);
  EXPECT_TRUE(Shown().empty());
  EXPECT_EQ(device_->counters().bad_requests, 4u);
  ram_.put(uint64_t{0x3f'fff0}, uint64_t{0x28});  // the frames are behind the end of memory
  ram_.put(uint64_t{0x3f'fff8}, uint64_t{1});
  Ask(uint64_t{1} << 63 | 0x3f'fff0);
  EXPECT_EQ(device_->counters().bad_requests, 5u);
}

TEST_F(CoiommuDeviceTest, RootAndLevelsAreWrittenOnce) {
  EXPECT_EQ(device_->read(CoiommuDevice::kRoot), kTables);
  EXPECT_EQ(device_->read(CoiommuDevice::kLevels), 4u);
  device_->write(CoiommuDevice::kRoot, 0x5000);
  device_->write(CoiommuDevice::kLevels, 5);
  EXPECT_EQ(device_->read(CoiommuDevice::kRoot), kTables);
  EXPECT_EQ(device_->read(CoiommuDevice::kLevels), 4u);
  EXPECT_EQ(device_->counters().bad_registers, 2u);
}

TEST_F(CoiommuDeviceTest, RegistersThatMakeNoSenseAreIgnored) {
  CoiommuDevice device({.devices = {0x28}}, {domain_.get(), pins_of_guest_.get(), requests_});
  device.write(CoiommuDevice::kCommand, CoiommuDevice::kActivate);  // of what?
  device.write(CoiommuDevice::kRoot, 0x5008);
  device.write(CoiommuDevice::kRoot, 0);
  device.write(CoiommuDevice::kLevels, 1);
  device.write(CoiommuDevice::kLevels, 6);
  device.write(CoiommuDevice::kLevels, uint64_t{1} << 32 | 4);
  device.write(CoiommuDevice::kCommand, 4);
  device.write(CoiommuDevice::kDoorbells + 4, 1);  // of a vCPU that there is not
  device.write(UINT64_MAX, 1);
  EXPECT_EQ(device.counters().bad_registers, 9u);
  EXPECT_EQ(device.read(CoiommuDevice::kRoot), 0u);
  EXPECT_EQ(device.read(CoiommuDevice::kLevels), 0u);
  EXPECT_EQ(device.counters().requests, 0u);
}

TEST_F(CoiommuDeviceTest, FiveLevelsReachFurther) {
  Begin({}, 5);
  const uint64_t frame = uint64_t{1} << 37;
  ASSERT_THAT(container_.map(ram_.map_request(frame << 12, 0x5000, 0x1000)), testing::IsOk());
  EXPECT_TRUE(guest_->map(frame));
  EXPECT_EQ(Shown(), (std::set<uint64_t>{frame}));
}

}  // namespace
}  // namespace mvgpu::domain
