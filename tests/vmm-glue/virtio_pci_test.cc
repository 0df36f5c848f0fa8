#include "vmm-glue/virtio/virtio_pci.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "tests/vmm-glue/virtio_fixture.h"

namespace mvgpu::glue {
namespace {

using testing::FailsWith;
using testing::FakeVirtioDevice;
using testing::IsOk;
using testing::IsOkAndHolds;
using testing::VirtioPciDriver;
using enum VirtioPciDriver::Structure;

constexpr uint32_t kMsixRegion = 1;
constexpr uint32_t kVirtioRegion = 4;

// ---- What a VMM asks ----------------------------------------------------------------------------

TEST_F(VirtioPciTest, HasTwoBarsAndConfigSpaceOnly) {
  for (uint32_t region = 0; region < kRegionCount; ++region) {
    const auto info = device_->region_info(region);
    const uint64_t expected = region == kMsixRegion     ? 0x2000
                              : region == kVirtioRegion ? 0x4000
                              : region == kRegionConfig ? 256
                                                        : 0;
    EXPECT_EQ(info.size, expected) << region;
    EXPECT_EQ(info.readable, expected != 0) << region;
    EXPECT_EQ(info.writable, expected != 0) << region;
  }
}

TEST_F(VirtioPciTest, HasOneMsixVectorPerQueueAndOneMore) {
  EXPECT_EQ(device_->irq_info(kIrqIntx).count, 0u);
  EXPECT_EQ(device_->irq_info(kIrqMsi).count, 0u);
  EXPECT_EQ(device_->irq_info(kIrqMsix).count, 3u);
  EXPECT_TRUE(device_->irq_info(kIrqMsix).eventfd);
  EXPECT_EQ(device_->irq_info(kIrqErr).count, 1u);
  EXPECT_EQ(device_->irq_info(kIrqReq).count, 0u);
}

TEST_F(VirtioPciTest, IsAVirtioGpuToLspci) {
  EXPECT_EQ(driver_->read_config<uint32_t>(0x00), 0x10501af4u);
  EXPECT_EQ(driver_->read_config<uint32_t>(0x08), 0x03800001u);
  EXPECT_EQ(driver_->read_config<uint32_t>(0x2c), 0x11001af4u);
  EXPECT_EQ(driver_->read_config<uint8_t>(0x3d), 0);
}

TEST_F(VirtioPciTest, EveryCapabilityIsWalkableAndInsideItsBar) {
  std::set<uint8_t> types;
  int msix = 0;
  for (const auto& c : driver_->capabilities()) {
    EXPECT_EQ(c.offset % 4, 0u);
    if (c.id == 0x11) {
      ++msix;
      EXPECT_EQ(driver_->read_config<uint16_t>(c.offset + 2), 2);
      EXPECT_EQ(driver_->read_config<uint32_t>(c.offset + 4), 0x0000u | kMsixRegion);
      EXPECT_EQ(driver_->read_config<uint32_t>(c.offset + 8), 0x1000u | kMsixRegion);
      continue;
    }
    ASSERT_EQ(c.id, 0x09);
    EXPECT_TRUE(types.insert(c.cfg_type).second) << "each type once";
    const uint8_t length = driver_->read_config<uint8_t>(c.offset + 2);
    EXPECT_EQ(length, c.cfg_type == kNotify || c.cfg_type == kPciCfg ? 20 : 16);
    if (c.cfg_type == kPciCfg) continue;
    EXPECT_EQ(c.bar, kVirtioRegion);
    EXPECT_EQ(c.bar_offset % 0x1000, 0u) << "each structure on its own page";
    EXPECT_GT(c.length, 0u);
    EXPECT_LE(c.bar_offset + c.length, device_->region_info(c.bar).size);
  }
  EXPECT_EQ(msix, 1);
  EXPECT_EQ(types, (std::set<uint8_t>{kCommon, kNotify, kIsr, kDevice, kPciCfg}));
}

TEST_F(VirtioPciTest, TheWholeConfigSpaceIsReadInOneMessageWithoutSideEffects) {
  StartDriver(kAllFeatures);
  device_->notify_config_change();  // something to lose in the ISR
  std::array<std::byte, 256> whole;
  device_->region_read(kRegionConfig, 0, whole);
  for (uint32_t i = 0; i < 256; ++i) {
    EXPECT_EQ(driver_->read_config<uint8_t>(i), static_cast<uint8_t>(whole[i])) << i;
  }
  EXPECT_EQ(driver_->read_isr(), 2);
}

TEST_F(VirtioPciTest, BarsAreSizedThroughConfigSpaceAndWorkWhereverTheyAre) {
  driver_->write_config<uint32_t>(0x14, 0xffffffff);
  EXPECT_EQ(driver_->read_config<uint32_t>(0x14), 0xffffe000u);
  driver_->write_config<uint32_t>(0x20, 0xffffffff);
  driver_->write_config<uint32_t>(0x24, 0xffffffff);
  EXPECT_EQ(driver_->read_config<uint32_t>(0x20), 0xffffc00cu);
  EXPECT_EQ(driver_->read_config<uint32_t>(0x24), 0xffffffffu);
  for (const uint32_t absent : {0x10u, 0x18u, 0x1cu, 0x30u}) {
    driver_->write_config<uint32_t>(absent, 0xffffffff);
    EXPECT_EQ(driver_->read_config<uint32_t>(absent), 0u) << absent;
  }
  // Cloud Hypervisor leaves it like this, SPDK never enables memory decode.
  driver_->write_config<uint16_t>(0x04, 0x0404);
  StartDriver(kAllFeatures);
  ExpectWorks();
}

// ---- The driver's life --------------------------------------------------------------------------

TEST_F(VirtioPciTest, ALinuxDriverComesUpAndTalks) {
  EXPECT_EQ(driver_->device_features(), kAllFeatures);
  EXPECT_EQ(driver_->queue_count(), 2);
  EXPECT_EQ(driver_->queue_size(0), 64);
  EXPECT_EQ(driver_->queue_size(1), 16);
  EXPECT_EQ(driver_->queue_size(2), 0) << "no such queue";
  StartDriver(kAllFeatures);
  EXPECT_EQ(fake_.driver_features, FakeVirtioDevice::kFeature)
      << "the transport's bits are its own";
  ExpectWorks();
  EXPECT_EQ(events_[1].take(), 1u);
  EXPECT_EQ(events_[0].take() + events_[2].take(), 0u);
  EXPECT_EQ(notified_, (std::vector<uint16_t>{0}));
}

TEST_F(VirtioPciTest, FeaturesOkNeedsVersion1AndNothingThatWasNotOffered) {
  EXPECT_FALSE(driver_->negotiate(kAllFeatures & ~VirtioPciDriver::kVersion1));
  EXPECT_FALSE(driver_->negotiate(kAllFeatures | 1u << 5));
  EXPECT_FALSE(driver_->negotiate(kAllFeatures | uint64_t{1} << 40));  // VIRTIO_F_RING_RESET
  EXPECT_FALSE(driver_->negotiate(0));
  EXPECT_EQ(fake_.driver_features, 0u) << "the device hears of accepted features only";
  EXPECT_TRUE(driver_->negotiate(VirtioPciDriver::kVersion1)) << "the least";
  EXPECT_TRUE(driver_->negotiate(kAllFeatures)) << "the most";
}

TEST_F(VirtioPciTest, FeatureWordsBeyondTheLastReadZeroAndRefuseBits) {
  driver_->put<uint32_t>(kCommon, 0, 2);
  EXPECT_EQ(driver_->get<uint32_t>(kCommon, 4), 0u);
  for (const uint32_t word : {0u, 1u}) {
    driver_->set_status(0);
    driver_->set_status(3);
    driver_->set_driver_features(kAllFeatures);
    driver_->put<uint32_t>(kCommon, 8, 0xffffffff);
    driver_->put<uint32_t>(kCommon, 12, word);
    EXPECT_EQ(driver_->get<uint32_t>(kCommon, 12), 0u);
    driver_->set_status(11);
    EXPECT_EQ(driver_->status(), word == 0 ? 11 : 3);
  }
}

TEST_F(VirtioPciTest, DriverOkNeedsFeaturesOk) {
  driver_->set_status(3);
  driver_->set_status(7);
  EXPECT_EQ(driver_->status(), 3);
  ASSERT_TRUE(driver_->negotiate(kAllFeatures));
  driver_->set_status(0x0f);
  EXPECT_EQ(driver_->status(), 0x0f);
}

TEST_F(VirtioPciTest, FeaturesStayAsNegotiated) {
  ASSERT_TRUE(driver_->negotiate(kAllFeatures));
  driver_->set_driver_features(0);
  driver_->put<uint32_t>(kCommon, 8, 0);
  EXPECT_EQ(driver_->get<uint32_t>(kCommon, 12), static_cast<uint32_t>(kAllFeatures));
}

TEST_F(VirtioPciTest, StatusBitsAreOnlyAddedAndNeedsResetIsTheDevices) {
  driver_->set_status(3);
  driver_->set_status(1);
  EXPECT_EQ(driver_->status(), 3);
  driver_->set_status(0x43 | 0x80);
  EXPECT_EQ(driver_->status(), 0x83)
      << "FAILED is kept, DEVICE_NEEDS_RESET is not the driver's to set";
  driver_->set_status(0);
  EXPECT_EQ(driver_->status(), 0);
}

TEST_F(VirtioPciTest, QueueSizesArePowersOfTwoUpToTheDevicesLimit) {
  driver_->put<uint16_t>(kCommon, 22, 0);
  for (const uint16_t bad : std::initializer_list<uint16_t>{0, 3, 65, 128, 32768, 65535}) {
    driver_->put<uint16_t>(kCommon, 24, bad);
    EXPECT_EQ(driver_->get<uint16_t>(kCommon, 24), 64) << bad;
  }
  for (const uint16_t good : std::initializer_list<uint16_t>{1, 2, 16, 64}) {
    driver_->put<uint16_t>(kCommon, 24, good);
    EXPECT_EQ(driver_->get<uint16_t>(kCommon, 24), good);
  }
  driver_->put<uint16_t>(kCommon, 22, 1);
  EXPECT_EQ(driver_->get<uint16_t>(kCommon, 24), 16) << "the other queue keeps its own";
}

TEST_F(VirtioPciTest, AnEnabledQueueKeepsItsPlace) {
  ASSERT_TRUE(driver_->negotiate(kAllFeatures));
  driver_->set_up_queue(0, queue_, 1);
  driver_->put<uint16_t>(kCommon, 24, 2);
  driver_->put<uint64_t>(kCommon, 32, 0x1234560);
  driver_->put<uint16_t>(kCommon, 28, 0);
  EXPECT_EQ(driver_->get<uint16_t>(kCommon, 24), 64);
  EXPECT_EQ(driver_->get<uint64_t>(kCommon, 32), queue_.descriptors());
  EXPECT_EQ(driver_->get<uint64_t>(kCommon, 40), queue_.available());
  EXPECT_EQ(driver_->get<uint64_t>(kCommon, 48), queue_.used());
  EXPECT_EQ(driver_->get<uint16_t>(kCommon, 28), 1);
}

TEST_F(VirtioPciTest, AQueueThatIsNotThereReadsZeroAndIgnoresWrites) {
  driver_->put<uint16_t>(kCommon, 22, 2);
  for (uint32_t offset = 24; offset < 56; ++offset) driver_->put<uint8_t>(kCommon, offset, 1);
  EXPECT_EQ(driver_->get<uint16_t>(kCommon, 24), 0);
  EXPECT_EQ(driver_->get<uint16_t>(kCommon, 26), 0xffff);
  for (uint32_t offset = 28; offset < 56; offset += 4) {
    EXPECT_EQ(driver_->get<uint32_t>(kCommon, offset), 0u) << offset;
  }
  driver_->put<uint16_t>(kCommon, 22, 0);
  EXPECT_EQ(driver_->get<uint16_t>(kCommon, 28), 0);
}

TEST_F(VirtioPciTest, VectorsThatDoNotExistBecomeNone) {
  EXPECT_EQ(driver_->get<uint16_t>(kCommon, 16), 0xffff) << "none at first";
  EXPECT_EQ(driver_->set_config_vector(2), 2);
  EXPECT_EQ(driver_->set_config_vector(3), 0xffff);
  EXPECT_EQ(driver_->set_up_queue(0, queue_, 2), 2);
  EXPECT_EQ(driver_->set_up_queue(0, queue_, 17), 0xffff);
}

TEST_F(VirtioPciTest, RegistersAreReadAndWrittenWithAnySizeAtAnyPlace) {
  driver_->put<uint16_t>(kCommon, 22, 1);
  driver_->put<uint64_t>(kCommon, 32, 0x1122334455667788);
  EXPECT_EQ(driver_->get<uint32_t>(kCommon, 36), 0x11223344u);
  EXPECT_EQ(driver_->get<uint8_t>(kCommon, 33), 0x77);
  driver_->put<uint8_t>(kCommon, 33, 0xee);
  EXPECT_EQ(driver_->get<uint64_t>(kCommon, 32), 0x112233445566ee88u);
  driver_->put<uint32_t>(kCommon, 38,
                         0xaabbccdd);  // the end of queue_desc, the start of queue_driver
  EXPECT_EQ(driver_->get<uint64_t>(kCommon, 32), 0xccdd33445566ee88u);
  EXPECT_EQ(driver_->get<uint64_t>(kCommon, 40), 0xaabbu);
  EXPECT_EQ(driver_->get<uint64_t>(kCommon, 21) >> 8 & 0xffff, 1u) << "queue_select";
}

TEST_F(VirtioPciTest, WhatLiesBetweenTheStructuresReadsZero) {
  std::vector<std::byte> data(0x1000 - 56, std::byte{0xee});
  device_->region_write(kVirtioRegion, 56, data);
  device_->region_read(kVirtioRegion, 56, data);
  EXPECT_THAT(data, ::testing::Each(std::byte{0}));
  data.assign(0x1000, std::byte{0xee});
  device_->region_read(kVirtioRegion, 0x3000, data);
  EXPECT_THAT(data, ::testing::Each(std::byte{0})) << "the notify structure is for writing";
}

TEST_F(VirtioPciTest, DeviceConfigIsReadAndWrittenUpToItsEnd) {
  fake_.config = BytesOf("0123456789abcdef");
  EXPECT_EQ(driver_->get<uint32_t>(kDevice, 4), 0x37363534u);
  EXPECT_EQ(driver_->get<uint64_t>(kDevice, 14), 0x6665u) << "zero behind the end";
  EXPECT_EQ(driver_->get<uint32_t>(kDevice, 16), 0u);
  driver_->put<uint32_t>(kDevice, 14, 0x41424344);
  driver_->put<uint32_t>(kDevice, 100, 0x41424344);
  EXPECT_EQ(TextOf(fake_.config), "0123456789abcdDC");
}

TEST_F(VirtioPciTest, AConfigChangeBumpsTheGenerationAndInterruptsARunningDriver) {
  ASSERT_TRUE(driver_->negotiate(kAllFeatures));
  driver_->set_config_vector(0);
  const uint8_t before = driver_->generation();
  device_->notify_config_change();
  EXPECT_EQ(driver_->generation(), static_cast<uint8_t>(before + 1));
  EXPECT_EQ(events_[0].take(), 0u) << "not before DRIVER_OK";
  EXPECT_EQ(driver_->read_isr(), 0);

  driver_->driver_ok();
  device_->notify_config_change();
  EXPECT_EQ(driver_->generation(), static_cast<uint8_t>(before + 2));
  EXPECT_EQ(events_[0].take(), 1u);
  EXPECT_EQ(driver_->read_isr(), 2);
  EXPECT_EQ(driver_->read_isr(), 0) << "reading clears";
}

// ---- The window in configuration space (4.1.4.9) ------------------------------------------------

class WindowTest : public VirtioPciTest {
 protected:
  void SetUp() override {
    VirtioPciTest::SetUp();
    for (const auto& c : driver_->capabilities()) {
      if (c.id == 0x09 && c.cfg_type == kPciCfg) window_ = c.offset;
    }
    ASSERT_NE(window_, 0u);
  }
  void Aim(uint8_t bar, uint32_t offset, uint32_t length) {
    driver_->write_config<uint8_t>(window_ + 4, bar);
    driver_->write_config<uint32_t>(window_ + 8, offset);
    driver_->write_config<uint32_t>(window_ + 12, length);
  }
  uint32_t window_ = 0;
};

TEST_F(WindowTest, ReachesTheRegistersOfTheBar) {
  Aim(kVirtioRegion, 20, 1);
  driver_->write_config<uint8_t>(window_ + 16, 3);
  EXPECT_EQ(driver_->status(), 3);
  EXPECT_EQ(driver_->read_config<uint8_t>(window_ + 16), 3);
  Aim(kVirtioRegion, 18, 2);
  EXPECT_EQ(driver_->read_config<uint16_t>(window_ + 16), 2);
  Aim(kVirtioRegion, 32, 4);
  driver_->write_config<uint32_t>(window_ + 16, 0x11223340);
  EXPECT_EQ(driver_->get<uint32_t>(kCommon, 32), 0x11223340u);
  EXPECT_EQ(driver_->read_config<uint32_t>(window_ + 16), 0x11223340u);
}

TEST_F(WindowTest, ReadingTheIsrThroughItClearsAndDumpsElsewhereDoNot) {
  StartDriver(kAllFeatures);
  device_->notify_config_change();
  Aim(kVirtioRegion, 0x1000, 1);
  (void)driver_->read_config<uint32_t>(window_ + 12);
  (void)driver_->read_config<uint32_t>(window_ + 20);
  EXPECT_EQ(driver_->read_config<uint8_t>(window_ + 16), 2);
  EXPECT_EQ(driver_->read_isr(), 0);
}

TEST_F(WindowTest, AimedNowhereItReadsZeroAndWritesNothing) {
  for (const auto& [bar, offset, length] :
       std::vector<std::tuple<uint8_t, uint32_t, uint32_t>>{{0, 20, 1},
                                                            {7, 20, 1},
                                                            {255, 20, 1},
                                                            {4, 0x4000, 4},
                                                            {4, 0xffffffff, 4},
                                                            {1, 0xfffffffe, 4}}) {
    Aim(bar, offset, length);
    driver_->write_config<uint32_t>(window_ + 16, 0x03030303);
    EXPECT_EQ(driver_->read_config<uint32_t>(window_ + 16), 0u) << offset;
    EXPECT_EQ(driver_->status(), 0);
  }
  for (const uint32_t length : {0u, 3u, 8u, 0xffffffffu}) {
    Aim(kVirtioRegion, 20, length);
    driver_->write_config<uint32_t>(window_ + 16, 3);
    EXPECT_EQ(driver_->status(), 0) << length;
  }
}

// ---- VFIO ---------------------------------------------------------------------------------------

TEST_F(VirtioPciTest, IrqCallsOutsideTheVectorsAreHarmless) {
  std::vector<UniqueFd> fds(4);
  device_->bind_irqs(kIrqMsix, 2, std::move(fds));
  device_->trigger_irq(kIrqMsix, 3);
  device_->set_irq_masked(kIrqMsix, 0x10000, true);
  device_->trigger_irq(kIrqMsix, 0);
  EXPECT_EQ(events_[0].take(), 1u);
  device_->trigger_irq(kIrqMsix, 2);
  EXPECT_EQ(events_[2].take(), 0u) << "unbound above";
  device_->disable_irqs(kIrqMsix);
  device_->trigger_irq(kIrqMsix, 0);
  EXPECT_EQ(events_[0].take(), 0u);
}

TEST_F(VirtioPciTest, TheErrorInterruptIsAcceptedAndNeverSignalled) {
  testing::EventCounter error;
  std::vector<UniqueFd> fds;
  fds.push_back(error.duplicate());
  device_->bind_irqs(kIrqErr, 0, std::move(fds));
  device_->trigger_irq(kIrqErr, 0);
  EXPECT_EQ(error.take(), 0u) << "QEMU would stop the VM";
  device_->disable_irqs(kIrqErr);
}

TEST_F(VirtioPciTest, ResetRestoresEverythingButMappingsAndInterrupts) {
  StartDriver(kAllFeatures);
  AddRequest("left over");
  driver_->notify(0);
  driver_->write_config<uint16_t>(0x04, 0x0406);
  driver_->write_config<uint32_t>(0x20, 0xfe000000);
  driver_->write<uint32_t>(kMsixRegion, 0, 0xfee00000);
  const uint64_t mappings = container_.totals().mappings;

  device_->reset();
  EXPECT_EQ(driver_->status(), 0);
  EXPECT_EQ(fake_.resets, 2) << "once by the driver before it started";
  EXPECT_FALSE(device_->has_work());
  EXPECT_FALSE(ProcessOne(0));
  EXPECT_TRUE(fake_.handled.empty());
  EXPECT_EQ(driver_->read_config<uint16_t>(0x04), 0);
  EXPECT_EQ(driver_->read_config<uint32_t>(0x20), 0xcu);
  EXPECT_EQ(driver_->read<uint32_t>(kMsixRegion, 0), 0u);
  EXPECT_EQ(driver_->get<uint16_t>(kCommon, 28), 0);
  EXPECT_EQ(container_.totals().mappings, mappings);
  StartDriver(kAllFeatures);
  ExpectWorks();
  EXPECT_EQ(events_[1].take(), 1u) << "still bound";
}

TEST_F(VirtioPciTest, DmaCallsGoToTheContainer) {
  EXPECT_THAT(device_->dma_map(ram_.map_request(0x8000000, 0, 0x2000)), IsOk());
  EXPECT_EQ(container_.totals().mappings, 2u);
  EXPECT_THAT(device_->dma_unmap(Iova(0x8000000), 0x2000), IsOkAndHolds(0x2000u));
  EXPECT_THAT(device_->dma_unmap(Iova(0x8000000), 0x2000), IsOkAndHolds(0u));
  EXPECT_THAT(device_->dma_unmap_all(), IsOkAndHolds(kRamSize));
  EXPECT_EQ(container_.totals().mappings, 0u);
}

TEST_F(VirtioPciTest, DevicesThatNoTransportCanCarryAreRefused) {
  const auto create = [&](std::vector<uint16_t> sizes, size_t config_size) {
    FakeVirtioDevice fake;
    fake.queue_sizes = std::move(sizes);
    fake.config.resize(config_size);
    return VirtioPciDevice::Create({}, &fake, domain_.get(), &container_, this);
  };
  EXPECT_THAT(create({}, 16), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(create({48}, 16), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(create({0}, 16), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(create({64}, 4097), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(create({32768}, 4096), IsOk());
}

}  // namespace
}  // namespace mvgpu::glue
