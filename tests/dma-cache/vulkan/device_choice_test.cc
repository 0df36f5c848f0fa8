#include "dma-cache/vulkan/device_choice.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#include <vector>

#include "tests/fakes/result_matchers.h"

namespace mvgpu::dma {
namespace {

using testing::FailsWith;
using ::testing::HasSubstr;
using testing::IsOk;
using testing::IsOkAndHolds;

VulkanDeviceFacts Able(std::string name, std::string uuid, std::string pci) {
  VulkanDeviceFacts facts;
  facts.name = std::move(name);
  facts.uuid = std::move(uuid);
  facts.pci = std::move(pci);
  facts.api_major = 1;
  facts.api_minor = 2;
  facts.has_host_import = facts.imports_buffers = facts.has_device_address = true;
  facts.has_coherent_memory = facts.has_compute_queue = true;
  return facts;
}

// Two cards, of which /dev/null is the render node of the second: a character device that every
// machine has.
class DeviceChoiceTest : public ::testing::Test {
 protected:
  DeviceChoiceTest() {
    struct stat null = {};
    EXPECT_EQ(stat("/dev/null", &null), 0);
    devices_[1].render_node = {major(null.st_rdev), minor(null.st_rdev)};
  }
  Result<size_t> Pick(std::string_view text) {
    MVGPU_ASSIGN_OR_RETURN(const DeviceChoice choice, DeviceChoice::Parse(text));
    return choice.pick(devices_);
  }

  std::vector<VulkanDeviceFacts> devices_{
      Able("Alpha 9", "00112233-4455-6677-8899-aabbccddeeff", "0000:01:00.0"),
      Able("Beta 7", "ffeeddcc-bbaa-9988-7766-554433221100", "0001:c1:00.1")};
};

TEST_F(DeviceChoiceTest, WithoutAWishTheFirstThatCanIsTaken) {
  EXPECT_THAT(Pick(""), IsOkAndHolds(0u));
  devices_[0].has_host_import = false;
  EXPECT_THAT(Pick(""), IsOkAndHolds(1u));
}

TEST_F(DeviceChoiceTest, ADeviceIsFoundByUuidPciAddressNodeOrName) {
  EXPECT_THAT(Pick("ffeeddcc-bbaa-9988-7766-554433221100"), IsOkAndHolds(1u));
  EXPECT_THAT(Pick("FFEEDDCC-BBAA-9988-7766-554433221100"), IsOkAndHolds(1u));
  EXPECT_THAT(Pick("0001:c1:00.1"), IsOkAndHolds(1u));
  EXPECT_THAT(Pick("0001:C1:00.1"), IsOkAndHolds(1u));
  EXPECT_THAT(Pick("01:00.0"), IsOkAndHolds(0u));
  EXPECT_THAT(Pick("/dev/null"), IsOkAndHolds(1u));
  EXPECT_THAT(Pick("Beta"), IsOkAndHolds(1u));
}

TEST_F(DeviceChoiceTest, DomainsOfPciAddressesMayBeLong) {
  EXPECT_THAT(Pick("00000000:01:00.0"), IsOkAndHolds(0u)) << "as nvidia-smi prints it";
  EXPECT_THAT(Pick("00001:c1:00.1"), IsOkAndHolds(1u));
  devices_[1].pci = "1000f:c1:00.1";  // behind Intel's VMD
  EXPECT_THAT(Pick("1000F:c1:00.1"), IsOkAndHolds(1u));
  EXPECT_THAT(Pick("0001000f:c1:00.1"), IsOkAndHolds(1u));
  for (const char* text : {"000f:c1:00.1", "2000f:c1:00.1", "00001000f:c1:00.1", "00f:c1:00.1",
                           ":01:00.0", "1:00.0", "1000g:c1:00.1", "1000fc1:00.1"}) {
    EXPECT_THAT(Pick(text), FailsWith(ErrorCode::kNotReachable)) << text;
  }
}

TEST_F(DeviceChoiceTest, WhatIsLikeAnotherDeviceIsNotMeant) {
  for (const char* text : {"00112233-4455-6677-8899-aabbccddeefe", "c1:00.1", "0000:01:00.1",
                           "/dev/zero", "beta", "7", "Alpha 99"}) {
    EXPECT_THAT(Pick(text), FailsWith(ErrorCode::kNotReachable)) << text;
  }
}

TEST_F(DeviceChoiceTest, TheErrorListsEachDeviceAndWhyItWasNotTaken) {
  devices_[0].has_device_address = false;
  const auto picked = Pick("Alpha");
  ASSERT_THAT(picked, FailsWith(ErrorCode::kNotReachable));
  EXPECT_EQ(picked.error().message(),
            "no vulkan device 'Alpha' that maps guest memory: Alpha 9 (uuid "
            "00112233-4455-6677-8899-aabbccddeeff, pci 0000:01:00.0) lacks bufferDeviceAddress, "
            "Beta 7 (uuid ffeeddcc-bbaa-9988-7766-554433221100, pci 0001:c1:00.1) is not meant; "
            "choose one by its uuid, pci address, render node or the beginning of its name");
}

TEST_F(DeviceChoiceTest, AMachineWithoutDevicesSaysWhatToInstall) {
  devices_.clear();
  const auto picked = Pick("");
  ASSERT_THAT(picked, FailsWith(ErrorCode::kNotReachable));
  EXPECT_THAT(picked.error().message(), HasSubstr("mesa-vulkan-drivers"));
}

TEST_F(DeviceChoiceTest, PathsThatAreNoDevicesAreRefused) {
  for (const char* path : {"/dev/dri/renderD000", "/etc/passwd", "/"}) {
    const auto choice = DeviceChoice::Parse(path);
    ASSERT_THAT(choice, FailsWith(ErrorCode::kInvalid)) << path;
    EXPECT_THAT(choice.error().message(), HasSubstr(path));
  }
}

TEST(WhyUnusableTest, EachThingThatIsNeededIsNamedWhereItIsMissing) {
  const VulkanDeviceFacts able = Able("a", "u", "p");
  EXPECT_EQ(WhyUnusable(able), "");
  const auto without = [&able](auto change) {
    VulkanDeviceFacts facts = able;
    change(facts);
    return WhyUnusable(facts);
  };
  EXPECT_THAT(without([](auto& facts) { facts.api_minor = 1; }), HasSubstr("vulkan 1.1"));
  EXPECT_THAT(without([](auto& facts) { facts.has_host_import = false; }),
              HasSubstr("VK_EXT_external_memory_host"));
  EXPECT_THAT(without([](auto& facts) { facts.has_device_address = false; }),
              HasSubstr("bufferDeviceAddress"));
  EXPECT_THAT(without([](auto& facts) { facts.imports_buffers = false; }), HasSubstr("buffers"));
  EXPECT_THAT(without([](auto& facts) { facts.has_coherent_memory = false; }),
              HasSubstr("coherent"));
  EXPECT_THAT(without([](auto& facts) { facts.has_compute_queue = false; }), HasSubstr("compute"));
}

}  // namespace
}  // namespace mvgpu::dma
