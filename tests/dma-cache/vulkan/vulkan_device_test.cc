// What is read of the devices of a machine, which one is opened, and what the errors say, in front
// of a loader with cards and versions of all kinds.
#include "dma-cache/vulkan/vulkan_device.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "dma-cache/vulkan/device_facts.h"
#include "dma-cache/vulkan/open_vulkan_mapper.h"
#include "tests/fakes/fake_vulkan_loader.h"
#include "tests/fakes/guest_ram.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::dma {
namespace {

using testing::FailsWith;
using testing::FakeVulkanCard;
using testing::FakeVulkanLoader;
using ::testing::HasSubstr;
using testing::IsOk;

constexpr char kOldUuid[] = "00010203-0405-0607-0809-0a0b0c0d0e0f";
constexpr char kAlphaUuid[] = "10111213-1415-1617-1819-1a1b1c1d1e1f";
constexpr char kBetaUuid[] = "20212223-2425-2627-2829-2a2b2c2d2e2f";
// Character devices that every machine has stand for render nodes.
constexpr char kOldNode[] = "/dev/full";
constexpr char kAlphaNode[] = "/dev/null";
constexpr char kBetaNode[] = "/dev/zero";

FakeVulkanCard::Node NodeOf(const char* path) {
  struct stat status = {};
  EXPECT_EQ(stat(path, &status), 0) << path;
  return {static_cast<int64_t>(major(status.st_rdev)), static_cast<int64_t>(minor(status.st_rdev))};
}

// Three cards: one of Vulkan 1.1, one of exactly 1.2, one that is newer. The primary node of each
// is the render node of the next.
class VulkanDeviceTest : public ::testing::Test {
 protected:
  VulkanDeviceTest() {
    Describe(&old_, {0, 2, 0, 0}, kOldNode, kAlphaNode, 0x00);
    Describe(&alpha_, {0, 0x81, 0x1f, 7}, kAlphaNode, kBetaNode, 0x10);
    Describe(&beta_, {0x10001, 0xc1, 0, 1}, kBetaNode, kOldNode, 0x20);
    old_.api = VK_MAKE_API_VERSION(0, 1, 1, 300);
    alpha_.api = VK_MAKE_API_VERSION(0, 1, 2, 0);
    beta_.api = VK_MAKE_API_VERSION(0, 1, 3, 275);
  }
  static void Describe(FakeVulkanCard* card, std::array<uint32_t, 4> pci, const char* render,
                       const char* primary, uint8_t first_of_uuid) {
    card->pci = pci;
    card->tells_nodes = true;
    card->render_node = NodeOf(render);
    card->primary_node = NodeOf(primary);
    for (uint8_t i = 0; i < VK_UUID_SIZE; ++i) {
      card->uuid[i] = static_cast<uint8_t>(first_of_uuid + i);
    }
  }

  Result<std::unique_ptr<VulkanLoader>> OpenLoader() {
    VulkanLoader::Options options;
    options.library = fake_.library();
    return VulkanLoader::Open(options);
  }
  Result<std::unique_ptr<VulkanDevice>> Open(std::string_view text) {
    MVGPU_ASSIGN_OR_RETURN(const DeviceChoice choice, DeviceChoice::Parse(text));
    MVGPU_ASSIGN_OR_RETURN(auto loader, OpenLoader());
    return VulkanDevice::Create(std::move(loader), choice);
  }
  std::string OpenError(std::string_view text, ErrorCode code) {
    const auto device = Open(text);
    EXPECT_THAT(device, FailsWith(code)) << text;
    EXPECT_EQ(fake_.instances, 0);
    return device ? "" : device.error().message();
  }
  // What is read of one card.
  VulkanDeviceFacts Facts(FakeVulkanCard& card) {
    const auto loader = OpenLoader();
    EXPECT_THAT(loader, IsOk());
    if (!loader) return {};
    return FactsOf(**loader, reinterpret_cast<VkPhysicalDevice>(&card));
  }

  FakeVulkanLoader fake_{MVGPU_FAKE_VULKAN_LOADER};
  FakeVulkanCard& old_ = fake_.add("Old Card");
  FakeVulkanCard& alpha_ = fake_.add("Alpha 9");
  FakeVulkanCard& beta_ = fake_.add("Beta 7");
};

TEST_F(VulkanDeviceTest, TheFactsAreWhatTheDriverSays) {
  alpha_.render_node = FakeVulkanCard::Node{226, 128};
  alpha_.primary_node = FakeVulkanCard::Node{225, 1};
  VulkanDeviceFacts facts = Facts(alpha_);
  EXPECT_EQ(facts.name, "Alpha 9");
  EXPECT_EQ(facts.uuid, kAlphaUuid);
  EXPECT_EQ(facts.pci, "0000:81:1f.7");
  EXPECT_EQ(facts.render_node, std::pair(226u, 128u));
  EXPECT_EQ(facts.api_major, 1u);
  EXPECT_EQ(facts.api_minor, 2u);
  EXPECT_EQ(WhyUnusable(facts), "");
  facts = Facts(beta_);
  EXPECT_EQ(facts.pci, "10001:c1:00.1") << "domains behind VMD have more digits";
  EXPECT_EQ(facts.api_minor, 3u);
}

TEST_F(VulkanDeviceTest, WhatADriverDoesNotTellIsNotThere) {
  alpha_.pci.reset();
  EXPECT_EQ(Facts(alpha_).pci, "");
  EXPECT_TRUE(Facts(alpha_).render_node.has_value()) << "the one without the other";
  alpha_.render_node.reset();
  EXPECT_FALSE(Facts(alpha_).render_node.has_value()) << "a primary node alone";
  beta_.tells_nodes = false;
  EXPECT_FALSE(Facts(beta_).render_node.has_value());
  EXPECT_EQ(Facts(beta_).pci, "10001:c1:00.1");
}

TEST_F(VulkanDeviceTest, ADeviceIsOpenedByUuidPciAddressRenderNodeOrName) {
  for (const char* text : {kAlphaUuid, "0000:81:1f.7", "81:1f.7", kAlphaNode, "Alpha"}) {
    const auto device = Open(text);
    ASSERT_THAT(device, IsOk()) << text;
    EXPECT_EQ((*device)->facts().name, "Alpha 9") << text;
    EXPECT_TRUE(alpha_.is_open && !beta_.is_open) << text;
  }
  for (const char* text : {kBetaUuid, "10001:c1:00.1", "00010001:C1:00.1", kBetaNode, "Beta 7"}) {
    const auto device = Open(text);
    ASSERT_THAT(device, IsOk()) << text;
    EXPECT_EQ((*device)->facts().name, "Beta 7") << text;
    EXPECT_TRUE(beta_.is_open && !alpha_.is_open) << text;
  }
}

TEST_F(VulkanDeviceTest, ADeviceThatIsTooOldIsNamedWithItsVersion) {
  for (const char* text : {kOldUuid, "02:00.0", kOldNode, "Old"}) {
    const std::string error = OpenError(text, ErrorCode::kNotReachable);
    EXPECT_THAT(error, HasSubstr(std::string("Old Card (uuid ") + kOldUuid +
                                 ", pci 0000:02:00.0) speaks vulkan 1.1, 1.2 is needed"));
    EXPECT_THAT(error, HasSubstr(std::string("Alpha 9 (uuid ") + kAlphaUuid +
                                 ", pci 0000:81:1f.7) is not meant"));
  }
  const auto any = Open("");
  ASSERT_THAT(any, IsOk());
  EXPECT_TRUE(alpha_.is_open) << "the first that can";
}

// It has no name but this one: what would tell more came with 1.1.
TEST_F(VulkanDeviceTest, ADeviceOfTheFirstVulkanIsAskedForItsNameAlone) {
  old_.api = VK_MAKE_API_VERSION(0, 1, 0, 99);
  const VulkanDeviceFacts facts = Facts(old_);
  EXPECT_EQ(facts.name, "Old Card");
  EXPECT_EQ(facts.uuid, "");
  EXPECT_EQ(facts.pci, "");
  EXPECT_THAT(OpenError("Old", ErrorCode::kNotReachable),
              HasSubstr(": Old Card speaks vulkan 1.0, 1.2 is needed, "));
}

TEST_F(VulkanDeviceTest, EachThingThatADriverLacksIsNamed) {
  const struct {
    std::function<void(FakeVulkanCard*)> change;
    const char* why;
  } cases[] = {
      {[](FakeVulkanCard* card) { card->has_host_import = false; },
       "lacks VK_EXT_external_memory_host"},
      {[](FakeVulkanCard* card) { card->has_device_address = false; }, "lacks bufferDeviceAddress"},
      {[](FakeVulkanCard* card) { card->imports_buffers = false; },
       "imports no host memory into buffers"},
      {[](FakeVulkanCard* card) { card->memory_types = {VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT}; },
       "has no host-coherent memory"},
      {[](FakeVulkanCard* card) {
         card->queue_families = {VK_QUEUE_GRAPHICS_BIT, VK_QUEUE_TRANSFER_BIT};
       },
       "has no queue for compute"},
  };
  for (const auto& [change, why] : cases) {
    FakeVulkanCard& card = fake_.add("Gamma");
    change(&card);
    const std::string error = OpenError("Gamma", ErrorCode::kNotReachable);
    EXPECT_THAT(error, HasSubstr(std::string("000000000000) ") + why + ";")) << why;
    EXPECT_THAT(error, HasSubstr("choose one by its uuid, pci address, render node"));
    fake_.cards.pop_back();
  }
}

TEST_F(VulkanDeviceTest, ALoaderBeforeVulkan12IsRefused) {
  const auto error = [this] {
    const auto loader = OpenLoader();
    EXPECT_THAT(loader, FailsWith(ErrorCode::kSystem));
    return loader ? "" : loader.error().message();
  };
  const std::string remedy = ", 1.2 is needed; install a newer libvulkan1";
  fake_.version = VK_MAKE_API_VERSION(0, 1, 1, 300);
  EXPECT_EQ(error(), "vulkan loader " + fake_.library() + " speaks vulkan 1.1" + remedy);
  fake_.version = VK_MAKE_API_VERSION(0, 1, 0, 300);
  EXPECT_THAT(error(), HasSubstr("speaks vulkan 1.0" + remedy));
  fake_.version = VK_MAKE_API_VERSION(0, 1, 3, 0);
  fake_.version_result = VK_ERROR_OUT_OF_HOST_MEMORY;
  EXPECT_THAT(error(), HasSubstr("speaks vulkan 1.0" + remedy));
  fake_.version_result = VK_SUCCESS;
  fake_.hidden = {"vkEnumerateInstanceVersion"};
  EXPECT_THAT(error(), HasSubstr("speaks vulkan 1.0" + remedy));
  EXPECT_EQ(fake_.instances, 0);
}

TEST_F(VulkanDeviceTest, ALoaderOfVulkan12IsEnough) {
  fake_.version = VK_MAKE_API_VERSION(0, 1, 2, 0);
  const auto loader = OpenLoader();
  ASSERT_THAT(loader, IsOk());
  EXPECT_EQ(fake_.wanted_version, static_cast<uint32_t>(VK_API_VERSION_1_2));
  EXPECT_EQ(fake_.instances, 1);
}

TEST_F(VulkanDeviceTest, TheLimitsOfImportsAreTheDevices) {
  alpha_.import_alignment = 0x10000;
  alpha_.largest_allocation = 0x300000;
  alpha_.most_allocations = 1600;
  alpha_.memory_types = {0, VK_MEMORY_PROPERTY_HOST_COHERENT_BIT,
                         VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT, VK_MEMORY_PROPERTY_HOST_COHERENT_BIT};
  alpha_.queue_families = {VK_QUEUE_TRANSFER_BIT, VK_QUEUE_GRAPHICS_BIT,
                           VK_QUEUE_GRAPHICS_BIT | VK_QUEUE_COMPUTE_BIT};
  const auto device = Open("Alpha");
  ASSERT_THAT(device, IsOk());
  const ImportLimits& limits = (*device)->target().limits;
  EXPECT_EQ(limits.alignment, 0x10000u);
  EXPECT_EQ(limits.largest_bytes, 0x300000u);
  EXPECT_EQ(limits.most_imports, 1500u) << "a sixteenth is left for others";
  EXPECT_EQ(limits.coherent_types, 0b1010u);
  EXPECT_EQ((*device)->queue_family(), 2u);
  EXPECT_EQ(alpha_.opened_family, 2u);
}

TEST_F(VulkanDeviceTest, WhatADeviceAllowsBeyondOursIsNotTaken) {
  alpha_.import_alignment = 64;
  alpha_.largest_allocation = uint64_t{1} << 40;
  alpha_.most_allocations = 1;
  const auto device = Open("Alpha");
  ASSERT_THAT(device, IsOk());
  EXPECT_EQ((*device)->target().limits.alignment, kPageSize);
  EXPECT_EQ((*device)->target().limits.largest_bytes, uint64_t{1} << 30);
  EXPECT_EQ((*device)->target().limits.most_imports, 1u);
}

TEST_F(VulkanDeviceTest, AMapperImportsForTheDeviceThatIsMeant) {
  testing::GuestRam ram(16 * kPageSize);
  VulkanMapperOptions options;
  options.library = fake_.library();
  options.device = kBetaNode;
  auto mapper = OpenVulkanMapper(options);
  ASSERT_THAT(mapper, IsOk());
  std::vector<MappedRun> mapped;
  const domain::PinnedRun run{testing::MakeRange(0x5000, 2 * kPageSize), ram.at(BytesIn(3))};
  ASSERT_THAT((*mapper)->map({&run, 1}, domain::Access::kReadWrite, &mapped), IsOk());
  ASSERT_EQ(mapped.size(), 1u);
  EXPECT_EQ(beta_.device.at(mapped[0].address), ram.at(BytesIn(3)));
  EXPECT_TRUE(alpha_.device.is_empty() && old_.device.is_empty());
  (*mapper)->unmap(mapped[0].address, 2 * kPageSize);
  (*mapper)->flush();
  EXPECT_TRUE(beta_.device.is_empty());
}

TEST_F(VulkanDeviceTest, ADriverWithoutTheFunctionsOfItsExtensionsIsAnError) {
  for (const char* function :
       {"vkGetMemoryHostPointerPropertiesEXT", "vkGetBufferDeviceAddress", "vkCreateBuffer"}) {
    fake_.hidden = {function};
    EXPECT_THAT(OpenError("Alpha", ErrorCode::kSystem),
                HasSubstr("driver of Alpha 9 does not offer the functions of its own extensions"));
    EXPECT_FALSE(alpha_.is_open);
  }
}

TEST_F(VulkanDeviceTest, WhatVulkanRefusesIsSaid) {
  alpha_.open_result = VK_ERROR_DEVICE_LOST;
  EXPECT_THAT(OpenError("Alpha", ErrorCode::kSystem),
              HasSubstr("vkCreateDevice for Alpha 9: the device was lost"));
  alpha_.open_result = VK_ERROR_TOO_MANY_OBJECTS;
  OpenError("Alpha", ErrorCode::kLimit);
  fake_.enumerate_result = VK_ERROR_INITIALIZATION_FAILED;
  EXPECT_THAT(OpenError("", ErrorCode::kSystem), HasSubstr("vkEnumeratePhysicalDevices"));
  fake_.instance_result = VK_ERROR_INCOMPATIBLE_DRIVER;
  EXPECT_THAT(OpenError("", ErrorCode::kSystem), HasSubstr("e.g. mesa-vulkan-drivers"));
  fake_.instance_result = fake_.enumerate_result = VK_SUCCESS;
  fake_.cards.clear();
  EXPECT_THAT(OpenError("", ErrorCode::kNotReachable), HasSubstr("there is none at all"));
}

}  // namespace
}  // namespace mvgpu::dma
