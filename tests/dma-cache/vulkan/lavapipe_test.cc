// A real Vulkan device, the one that Mesa runs on the CPU, works on guest memory at the addresses
// that the cache returned, with the validation layer watching.

#include <dlfcn.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <optional>
#include <vector>

#include "dma-cache/dma_cache.h"
#include "dma-cache/vulkan/open_vulkan_mapper.h"
#include "dma-cache/vulkan/vulkan_mapper.h"
#include "tests/dma-cache/vulkan/validation_log.h"
#include "tests/dma-cache/vulkan/word_copier.h"
#include "tests/fakes/dma_party.h"
#include "tests/fakes/guest_ram.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::dma {
namespace {

using ::testing::ElementsAre;
using testing::FailsWith;
using testing::GuestRam;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::IsOk;
using testing::MakeRange;
using testing::ValidationLog;
using testing::WordCopier;

constexpr char kLavapipe[] = "llvmpipe";
constexpr uint32_t kKey = 0x5aa50ff0;
constexpr uint64_t kWords = kPageSize / 4;  // in a page

// Mesa's device keeps memory of its own until the end of the process: LeakSanitizer finds it again
// only while the library is loaded. It need not be found: what is missing, tests will say.
[[maybe_unused]] void* const kept_loaded = dlopen("libvulkan_lvp.so", RTLD_LAZY | RTLD_NODELETE);

// Guest memory at IOVA 0, a cache in front of a Vulkan mapper, and a device that copies.
class LavapipeTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto domain = domain::ApiOnlyDomain::Create({}, domain::MakeNonePinBackend(), nullptr, nullptr);
    ASSERT_THAT(domain, IsOk());
    domain_ = std::move(*domain);
    ASSERT_THAT(container_.attach(domain_.get()), IsOk());
    ASSERT_THAT(container_.map(ram_.map_request(0, 0, ram_.size())), IsOk());
    ram_.fill_pattern();
    auto loader = VulkanLoader::Open(log_.options());
    ASSERT_THAT(loader, IsOk());
    log_.listen(**loader);
    auto device = VulkanDevice::Create(std::move(*loader), *DeviceChoice::Parse(kLavapipe));
    ASSERT_THAT(device, IsOk());
    device_ = std::move(*device);
    copier_.emplace(device_.get());
    VulkanMapper::Options options;
    options.mapping_at = [this](Iova at) { return container_.mapping_at(at); };
    mapper_.emplace(device_->target(), options);
    cache_.emplace(domain_.get(), &*mapper_);
    user_.emplace(&*cache_);
  }
  void TearDown() override {
    user_.reset();
    cache_.reset();
    EXPECT_EQ(mapper_.has_value() ? Figure("import_bytes") : 0, 0u);
    mapper_.reset();
    copier_.reset();
    if (device_ != nullptr) log_.stop(device_->loader());
    device_.reset();
    EXPECT_THAT(log_.messages, IsEmpty());
    ASSERT_THAT(container_.detach(domain_.get()), IsOk());
  }

  Result<DmaMapping> Use(uint64_t page, uint64_t count, Direction direction) {
    return (*user_)->map(MakeRange(BytesIn(page), BytesIn(count)), direction);
  }
  uint64_t Figure(std::string_view name) const {
    for (const auto& [figure, value] : mapper_->figures())
      if (figure == name) return value;
    ADD_FAILURE() << "no figure " << name;
    return 0;
  }
  // The device copies guest pages, page by page, at the addresses of two uses.
  void DeviceCopies(const DmaMapping& from, const DmaMapping& to) {
    const std::vector<DmaAddr> sources = PagesOfUse(from);
    const std::vector<DmaAddr> targets = PagesOfUse(to);
    ASSERT_EQ(sources.size(), targets.size());
    for (size_t i = 0; i < sources.size(); ++i) {
      copier_->run(sources[i], targets[i], static_cast<uint32_t>(kWords), kKey);
    }
  }
  static std::vector<DmaAddr> PagesOfUse(const DmaMapping& use) {
    std::vector<DmaAddr> pages;
    for (const MappedRun& run : use.runs()) {
      for (uint64_t at = 0; at < run.iova.size(); at += kPageSize)
        pages.push_back(run.address + at);
    }
    return pages;
  }
  std::vector<uint32_t> WordsAt(uint64_t offset, uint64_t pages) {
    std::vector<uint32_t> words(pages * kWords);
    std::memcpy(words.data(), ram_.at(offset), BytesIn(pages));
    return words;
  }
  static std::vector<uint32_t> Keyed(std::vector<uint32_t> words) {
    for (uint32_t& word : words) word ^= kKey;
    return words;
  }

  GuestRam ram_{16u << 20};
  domain::Container container_;
  std::unique_ptr<domain::ApiOnlyDomain> domain_;
  ValidationLog log_;
  std::unique_ptr<VulkanDevice> device_;
  std::optional<WordCopier> copier_;
  std::optional<VulkanMapper> mapper_;
  std::optional<DmaCache> cache_;
  std::optional<testing::DmaParty> user_;
};

TEST_F(LavapipeTest, AShaderReadsAndWritesGuestPagesAtTheAddressesOfTheCache) {
  const std::vector<uint32_t> before = WordsAt(BytesIn(3), 1);
  const std::vector<uint32_t> neighbours[] = {WordsAt(BytesIn(99), 1), WordsAt(BytesIn(101), 1)};
  auto from = Use(3, 1, Direction::kToDevice);
  auto to = Use(100, 1, Direction::kFromDevice);
  ASSERT_THAT(from, IsOk());
  ASSERT_THAT(to, IsOk());
  DeviceCopies(*from, *to);
  EXPECT_EQ(WordsAt(BytesIn(100), 1), Keyed(before)) << "what the guest sees in its own mapping";
  EXPECT_EQ(WordsAt(BytesIn(3), 1), before);
  EXPECT_EQ(WordsAt(BytesIn(99), 1), neighbours[0]);
  EXPECT_EQ(WordsAt(BytesIn(101), 1), neighbours[1]);
  // The guest writes, the device sees it, without another import.
  ram_.put(BytesIn(3), uint32_t{0xfeedbeef});
  const uint64_t calls = Figure("vulkan_calls");
  DeviceCopies(*from, *to);
  EXPECT_EQ(ram_.get<uint32_t>(BytesIn(100)), 0xfeedbeef ^ kKey);
  EXPECT_EQ(Figure("vulkan_calls"), calls);
}

TEST_F(LavapipeTest, ARunOverManyPiecesArrivesWhole) {
  constexpr uint64_t kPages = 1100;  // 4.3 MiB: three pieces at least
  const std::vector<uint32_t> before = WordsAt(BytesIn(200), kPages);
  auto from = Use(200, kPages, Direction::kToDevice);
  auto to = Use(2000, kPages, Direction::kFromDevice);
  ASSERT_THAT(from, IsOk());
  ASSERT_THAT(to, IsOk());
  EXPECT_GE(Figure("pieces"), 3u);
  DeviceCopies(*from, *to);
  EXPECT_EQ(WordsAt(BytesIn(2000), kPages), Keyed(before));
}

TEST_F(LavapipeTest, ScatteredBackingArrivesInTheOrderOfItsIovas) {
  const uint64_t base = uint64_t{1} << 32;
  const uint64_t backing[] = {70, 7, 3000, 71, 8};  // pages of the file, one IOVA page each
  std::vector<uint32_t> expected;
  for (size_t i = 0; i < std::size(backing); ++i) {
    ASSERT_THAT(container_.map(ram_.map_request(base + BytesIn(i), BytesIn(backing[i]), kPageSize)),
                IsOk());
    for (const uint32_t word : Keyed(WordsAt(BytesIn(backing[i]), 1))) expected.push_back(word);
  }
  auto from = (*user_)->map(MakeRange(base, BytesIn(std::size(backing))), Direction::kToDevice);
  auto to = Use(500, std::size(backing), Direction::kFromDevice);
  ASSERT_THAT(from, IsOk());
  ASSERT_THAT(to, IsOk());
  DeviceCopies(*from, *to);
  EXPECT_EQ(WordsAt(BytesIn(500), std::size(backing)), expected);
}

TEST_F(LavapipeTest, NothingIsImportedOfMemoryThatTheVmmTookAway) {
  const uint64_t base = uint64_t{1} << 32;
  GuestRam other(4u << 20);
  ASSERT_THAT(container_.map(other.map_request(base, 0, other.size())), IsOk());
  auto revoked = (*user_)->map(MakeRange(base, other.size()), Direction::kBidirectional);
  auto kept = Use(3, 1, Direction::kToDevice);
  ASSERT_THAT(revoked, IsOk());
  ASSERT_THAT(kept, IsOk());
  ASSERT_THAT(container_.unmap(Iova(base), other.size()), IsOk());
  EXPECT_FALSE(revoked->is_valid());
  EXPECT_EQ(Figure("pieces"), 1u);
  EXPECT_EQ(Figure("mapped_pages"), 1u);
  // The same IOVA with other memory behind it: the device sees that.
  ASSERT_THAT(container_.map(ram_.map_request(base, BytesIn(40), kPageSize)), IsOk());
  auto anew = (*user_)->map(MakeRange(base, kPageSize), Direction::kFromDevice);
  ASSERT_THAT(anew, IsOk());
  DeviceCopies(*kept, *anew);
  EXPECT_EQ(WordsAt(BytesIn(40), 1), Keyed(WordsAt(BytesIn(3), 1)));
}

// Without this the tests above could not fail on a message.
TEST_F(LavapipeTest, TheValidationLayerIsListening) {
  VkBufferCreateInfo nonsense = {};
  nonsense.sType = VK_STRUCTURE_TYPE_BUFFER_CREATE_INFO;
  nonsense.size = 0;
  nonsense.usage = VK_BUFFER_USAGE_TRANSFER_SRC_BIT;
  VkBuffer buffer = VK_NULL_HANDLE;
  if (device_->target().functions.create_buffer(device_->handle(), &nonsense, nullptr, &buffer) ==
      VK_SUCCESS) {
    device_->target().functions.destroy_buffer(device_->handle(), buffer, nullptr);
  }
  EXPECT_THAT(log_.messages, ElementsAre(HasSubstr("VUID-VkBufferCreateInfo-size-00912")));
  log_.messages.clear();
}

TEST(OpenVulkanMapperTest, ADeviceIsFoundByNameAndByUuid) {
  auto loader = VulkanLoader::Open({});
  ASSERT_THAT(loader, IsOk());
  auto device = VulkanDevice::Create(std::move(*loader), *DeviceChoice::Parse(kLavapipe));
  ASSERT_THAT(device, IsOk());
  const std::string uuid = (*device)->facts().uuid;
  EXPECT_EQ((*device)->facts().pci, "") << "it is no card";
  for (const std::string& name : {std::string(), std::string(kLavapipe), uuid}) {
    VulkanMapperOptions options;
    options.device = name;
    EXPECT_THAT(OpenVulkanMapper(options), IsOk()) << name;
  }
}

TEST(OpenVulkanMapperTest, AnUnknownDeviceIsAnErrorThatListsThoseThereAre) {
  VulkanMapperOptions options;
  for (const char* name :
       {"00000000-0000-0000-0000-00000000000f", "0000:ff:1f.7", "/dev/null", "No Such Card"}) {
    options.device = name;
    const auto mapper = OpenVulkanMapper(options);
    ASSERT_THAT(mapper, FailsWith(ErrorCode::kNotReachable)) << name;
    EXPECT_THAT(mapper.error().message(), HasSubstr(name));
    EXPECT_THAT(mapper.error().message(), HasSubstr("llvmpipe"));
    EXPECT_THAT(mapper.error().message(), HasSubstr("is not meant"));
  }
  options.device = "/dev/dri/renderD000";
  EXPECT_THAT(OpenVulkanMapper(options), FailsWith(ErrorCode::kInvalid));
}

TEST(OpenVulkanMapperTest, WithoutALoaderTheErrorSaysWhatToInstall) {
  VulkanMapperOptions options;
  options.library = "libvulkan-that-is-not-here.so.1";
  const auto mapper = OpenVulkanMapper(options);
  ASSERT_THAT(mapper, FailsWith(ErrorCode::kSystem));
  EXPECT_THAT(mapper.error().message(), HasSubstr("libvulkan-that-is-not-here.so.1"));
  EXPECT_THAT(mapper.error().message(), HasSubstr("install libvulkan1"));
  options.library = "libm.so.6";
  const auto no_loader = OpenVulkanMapper(options);
  ASSERT_THAT(no_loader, FailsWith(ErrorCode::kSystem));
  EXPECT_THAT(no_loader.error().message(), HasSubstr("not a vulkan loader"));
}

TEST(VulkanLoaderTest, AMachineWithoutDriversSaysWhatToInstall) {
  for (const char* name : {"VK_DRIVER_FILES", "VK_ICD_FILENAMES"})
    setenv(name, "/dev/null/no.json", 1);
  const auto mapper = OpenVulkanMapper({});
  for (const char* name : {"VK_DRIVER_FILES", "VK_ICD_FILENAMES"}) unsetenv(name);
  ASSERT_FALSE(mapper.has_value());
  EXPECT_THAT(mapper.error().message(), HasSubstr("e.g. mesa-vulkan-drivers"));
}

TEST(VulkanLoaderTest, ALayerThatIsNotInstalledIsAnError) {
  VulkanLoader::Options options;
  options.layers = {"VK_LAYER_MVGPU_that_is_not_here"};
  const auto loader = VulkanLoader::Open(options);
  ASSERT_THAT(loader, FailsWith(ErrorCode::kSystem));
  EXPECT_THAT(loader.error().message(), HasSubstr("a layer is not installed"));
}

}  // namespace
}  // namespace mvgpu::dma
