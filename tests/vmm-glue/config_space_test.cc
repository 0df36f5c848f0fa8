#include "vmm-glue/pci/config_space.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <vector>

namespace mvgpu::glue {
namespace {

class ConfigSpaceTest : public ::testing::Test {
 protected:
  ConfigSpaceTest()
      : space_({.vendor_id = 0x1af4,
                .device_id = 0x1050,
                .revision = 1,
                .class_code = 0x038000,
                .subsystem_vendor_id = 0x1af4,
                .subsystem_id = 0x1100}) {}

  template <typename T>
  T Get(uint32_t offset) {
    T value{};
    space_.read(offset, std::as_writable_bytes(std::span(&value, 1)));
    return value;
  }
  template <typename T>
  void Put(uint32_t offset, T value) {
    space_.write(offset, std::as_bytes(std::span(&value, 1)));
  }

  ConfigSpace space_;
};

TEST_F(ConfigSpaceTest, SaysWhoItIs) {
  EXPECT_EQ(Get<uint16_t>(0x00), 0x1af4);
  EXPECT_EQ(Get<uint16_t>(0x02), 0x1050);
  EXPECT_EQ(Get<uint8_t>(0x08), 1);
  EXPECT_EQ(Get<uint32_t>(0x08) >> 8, 0x038000u);
  EXPECT_EQ(Get<uint8_t>(0x0e), 0) << "header type 0, one function";
  EXPECT_EQ(Get<uint16_t>(0x2c), 0x1af4);
  EXPECT_EQ(Get<uint16_t>(0x2e), 0x1100);
  EXPECT_EQ(Get<uint32_t>(0x30), 0u) << "no ROM";
  EXPECT_EQ(Get<uint8_t>(0x3d), 0) << "no interrupt pin";
}

TEST_F(ConfigSpaceTest, IgnoresWritesToReadOnlyBits) {
  Put<uint32_t>(0x00, 0xffffffff);
  EXPECT_EQ(Get<uint32_t>(0x00), 0x10501af4u);
  Put<uint16_t>(0x04, 0xffff);
  EXPECT_EQ(Get<uint16_t>(0x04), 0x0546) << "I/O space and reserved bits stay clear";
  Put<uint16_t>(0x06, 0xffff);
  EXPECT_EQ(Get<uint16_t>(0x06), 0x0010);
  Put<uint32_t>(0x30, 0xfffff800);
  EXPECT_EQ(Get<uint32_t>(0x30), 0u) << "ROM sizing finds none";
  Put<uint8_t>(0x3c, 11);
  EXPECT_EQ(Get<uint8_t>(0x3c), 11);
}

TEST_F(ConfigSpaceTest, WritesOfOneByteLeaveItsNeighbours) {
  Put<uint16_t>(0x04, 0x0406);
  Put<uint8_t>(0x04, 0x00);
  EXPECT_EQ(Get<uint16_t>(0x04), 0x0400);
}

TEST_F(ConfigSpaceTest, A32BitBarIsSizedByWritingOnes) {
  space_.add_bar(1, ConfigSpace::BarKind::kMemory32, 0x2000);
  EXPECT_EQ(Get<uint32_t>(0x14), 0u);
  Put<uint32_t>(0x14, 0xffffffff);
  EXPECT_EQ(Get<uint32_t>(0x14), 0xffffe000u);
  Put<uint32_t>(0x14, 0xfebf2123);
  EXPECT_EQ(Get<uint32_t>(0x14), 0xfebf2000u);
}

TEST_F(ConfigSpaceTest, A64BitBarHasAllOnesInItsUpperHalf) {
  space_.add_bar(4, ConfigSpace::BarKind::kMemory64Prefetchable, 0x4000);
  EXPECT_EQ(Get<uint32_t>(0x20), 0xcu);
  Put<uint64_t>(0x20, 0xffffffffffffffff);
  EXPECT_EQ(Get<uint32_t>(0x20), 0xffffc00cu);
  EXPECT_EQ(Get<uint32_t>(0x24), 0xffffffffu);
  Put<uint32_t>(0x20, 0x00004000);
  Put<uint32_t>(0x24, 0x00000008);
  EXPECT_EQ(Get<uint64_t>(0x20), 0x80000400cu);
}

TEST_F(ConfigSpaceTest, BarsThatAreNotThereReadZeroAfterOnes) {
  for (uint32_t offset = 0x10; offset < 0x28; offset += 4) {
    Put<uint32_t>(offset, 0xffffffff);
    EXPECT_EQ(Get<uint32_t>(offset), 0u) << offset;
  }
}

TEST_F(ConfigSpaceTest, CapabilitiesAreLinkedAlignedAndMasked) {
  const std::array<std::byte, 3> body{std::byte{0x11}, std::byte{0x22}, std::byte{0x33}};
  const std::array<std::byte, 3> writable{std::byte{0}, std::byte{0x0f}, std::byte{0}};
  const uint32_t first = space_.add_capability(0x09, body, writable);
  const uint32_t second = space_.add_capability(0x11, body, writable);
  EXPECT_EQ(first, 0x40u);
  EXPECT_EQ(second, 0x48u);

  EXPECT_EQ(Get<uint8_t>(0x34), second);
  EXPECT_EQ(Get<uint16_t>(second), 0x11 | first << 8);
  EXPECT_EQ(Get<uint16_t>(first), 0x0009);
  Put<uint32_t>(first, 0xffffffff);
  EXPECT_EQ(Get<uint32_t>(first), 0x2f110009u);
  EXPECT_EQ(Get<uint8_t>(first + 4), 0x33);
}

TEST_F(ConfigSpaceTest, ResetRestoresDefaults) {
  space_.add_bar(1, ConfigSpace::BarKind::kMemory32, 0x1000);
  std::array<std::byte, ConfigSpace::kSize> before;
  space_.read(0, before);
  for (uint32_t offset = 0; offset < ConfigSpace::kSize; ++offset) Put<uint8_t>(offset, 0xff);
  EXPECT_NE(Get<uint32_t>(0x14), 0u);

  space_.reset();
  std::array<std::byte, ConfigSpace::kSize> after;
  space_.read(0, after);
  EXPECT_EQ(before, after);
}

TEST_F(ConfigSpaceTest, BeyondTheEndReadsZeroAndIgnoresWrites) {
  std::vector<std::byte> data(16, std::byte{0xee});
  space_.write(ConfigSpace::kSize - 4, data);
  space_.write(ConfigSpace::kSize + 1000, data);
  space_.read(ConfigSpace::kSize - 4, data);
  EXPECT_THAT(data, ::testing::Each(std::byte{0}));
  data.assign(16, std::byte{0xee});
  space_.read(0xffffffff, data);
  EXPECT_THAT(data, ::testing::Each(std::byte{0}));
}

}  // namespace
}  // namespace mvgpu::glue
