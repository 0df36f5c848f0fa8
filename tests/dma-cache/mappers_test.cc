// One test over all mappers: whatever kind of address the cache returns, the device that follows it
// finds the guest's bytes, and with an IOMMU it finds nothing after a revocation.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <ostream>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/assigned/software_iommu.h"
#include "apionly-domain/container.h"
#include "dma-cache/dma_cache.h"
#include "dma-cache/iommu_mapper.h"
#include "dma-cache/physical_mapper.h"
#include "tests/dma-cache/dma_device.h"
#include "tests/fakes/dma_party.h"
#include "tests/fakes/guest_ram.h"
#include "tests/fakes/result_matchers.h"
#ifdef MVGPU_TEST_HAS_VULKAN
#include "tests/dma-cache/vulkan/lavapipe_dma_device.h"
#endif

namespace mvgpu::dma {
namespace {

using testing::DeviceSurroundings;
using testing::DmaDevice;
using ::testing::ElementsAre;
using testing::FailsWith;
using testing::GuestRam;
using ::testing::IsEmpty;
using testing::IsOk;
using testing::MakeRange;

// A device that finds its way by a function: where it ends up at an address, null at a fault.
class FollowingDevice : public DmaDevice {
 public:
  using Follow = std::function<std::byte*(DmaAddr)>;

  FollowingDevice(std::unique_ptr<Mapper> mapper, Follow follow)
      : mapper_(std::move(mapper)), follow_(std::move(follow)) {}
  Mapper& mapper() override { return *mapper_; }
  bool read(DmaAddr address, std::span<std::byte> bytes) override {
    const std::byte* seen = follow_(address);
    if (seen != nullptr) std::memcpy(bytes.data(), seen, bytes.size());
    return seen != nullptr;
  }

 private:
  const std::unique_ptr<Mapper> mapper_;
  const Follow follow_;
};

class IommuDevice final : public DmaDevice {
 public:
  Mapper& mapper() override { return mapper_; }
  bool read(DmaAddr address, std::span<std::byte> bytes) override {
    const std::byte* seen = eye_->translate(Iova(address.value()), domain::Access::kRead);
    if (seen != nullptr) std::memcpy(bytes.data(), seen, bytes.size());
    return seen != nullptr;
  }
  bool faults() const override { return true; }

 private:
  domain::SoftwareIommu* const eye_ = new domain::SoftwareIommu;  // the space's
  domain::AssignedSpace space_{std::unique_ptr<domain::AssignedIommu>(eye_), {}};
  IommuMapper mapper_{&space_};
};

Result<std::unique_ptr<DmaDevice>> MakeNone(const DeviceSurroundings&) {
  return std::make_unique<FollowingDevice>(
      MakeNoneMapper(), [](DmaAddr address) { return std::bit_cast<std::byte*>(address.value()); });
}

// The device's own way to physical memory: a frame is the page of this test's view of RAM that the
// kernel says is in it.
Result<std::unique_ptr<DmaDevice>> MakePhysical(const DeviceSurroundings& vm) {
  MVGPU_ASSIGN_OR_RETURN(std::unique_ptr<Mapper> mapper, PhysicalMapper::Create());
  auto follow = [&ram = *vm.ram](DmaAddr address) -> std::byte* {
    const UniqueFd fd(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
    for (uint64_t at = 0; at < ram.size(); at += kPageSize) {
      uint64_t word = 0;
      const auto offset = static_cast<off_t>(std::bit_cast<uint64_t>(ram.at(at)) / 4096 * 8);
      if (pread(fd.get(), &word, sizeof(word), offset) != sizeof(word)) return nullptr;
      const bool is_present = (word >> 63) != 0;
      if (is_present && (word & 0x7fffffffffffff) == address.page()) {
        return ram.at(at) + address.offset_in_page();
      }
    }
    return nullptr;
  };
  return std::make_unique<FollowingDevice>(std::move(mapper), std::move(follow));
}

Result<std::unique_ptr<DmaDevice>> MakeIommu(const DeviceSurroundings&) {
  return std::make_unique<IommuDevice>();
}

struct Kind {
  const char* name;
  Result<std::unique_ptr<DmaDevice>> (*make)(const DeviceSurroundings& vm);
  bool (*may_lack)(const Error& error);  // whether this machine cannot have it
};

void PrintTo(const Kind& kind, std::ostream* os) { *os << kind.name; }

bool MayNotLack(const Error&) { return false; }
bool MayLackPrivilege(const Error& error) { return error.code() == ErrorCode::kPermission; }

const Kind kKinds[] = {
    {"none", MakeNone, MayNotLack},
    {"physical", MakePhysical, MayLackPrivilege},
    {"iommu", MakeIommu, MayNotLack},
#ifdef MVGPU_TEST_HAS_VULKAN
    {"vulkan", testing::MakeLavapipe, [](const Error&) { return testing::IsLavapipeMissing(); }},
#endif
};

class MappersTest : public ::testing::TestWithParam<Kind> {
 protected:
  void SetUp() override {
    ram_.fill_pattern();
    auto device = GetParam().make({&ram_, &container_});
    if (!device) {
      ASSERT_TRUE(GetParam().may_lack(device.error())) << device.error().message();
      GTEST_SKIP() << device.error().message();
    }
    device_ = std::move(*device);
    auto domain =
        domain::ApiOnlyDomain::Create({}, domain::MakeMlockPinBackend(), nullptr, nullptr);
    ASSERT_THAT(domain, IsOk());
    domain_ = std::move(*domain);
    ASSERT_THAT(container_.attach(domain_.get()), IsOk());
    cache_.emplace(domain_.get(), &device_->mapper());
    user_.emplace(&*cache_);
    // 16 pages at 1 MiB; and pages at 16 MiB that lie backwards in RAM.
    ASSERT_THAT(container_.map(ram_.map_request(0x100000, 0, 16 * kPageSize)), IsOk());
    for (uint64_t i = 0; i < 8; ++i) {
      ASSERT_THAT(
          container_.map(ram_.map_request(0x1000000 + BytesIn(i), BytesIn(40 - 2 * i), kPageSize)),
          IsOk());
    }
  }
  void TearDown() override {
    user_.reset();
    cache_.reset();
    if (domain_ == nullptr) return;
    EXPECT_THAT(container_.unmap_all(), IsOk());
    EXPECT_THAT(container_.detach(domain_.get()), IsOk());
  }

  Result<DmaMapping> Use(uint64_t iova, uint64_t size) {
    return (*user_)->map(MakeRange(iova, size), Direction::kToDevice);
  }
  static std::optional<DmaAddr> AddressIn(const DmaMapping& use, Iova iova) {
    for (const auto& run : use.runs()) {
      if (run.iova.contains(iova)) return run.address + (iova - run.iova.start());
    }
    return std::nullopt;
  }
  // The bytes that the device reads for a use, page by page, and what the guest has there.
  void ExpectDeviceSeesTheGuest(const DmaMapping& use) {
    for (const auto& run : use.runs()) {
      for (uint64_t at = 0; at < run.iova.size(); at += kPageSize) {
        std::vector<std::byte> guest(kPageSize);
        ASSERT_THAT(domain_->read(run.iova.start() + at, guest), IsOk());
        std::vector<std::byte> seen(kPageSize);
        ASSERT_TRUE(device_->read(run.address + at, seen)) << "a fault";
        EXPECT_EQ(seen, guest);
      }
    }
  }

  bool IsSeen(DmaAddr address) {
    std::array<std::byte, 4> word;
    return device_->read(address, word);
  }
  // As far as the mapper counts them.
  void ExpectMappedPages(uint64_t pages) {
    for (const auto& [name, value] : device_->mapper().figures()) {
      if (name == "mapped_pages" || name == "allocated_pages") {
        EXPECT_EQ(value, pages) << name;
      }
    }
  }

  GuestRam ram_{64 * kPageSize};
  std::unique_ptr<DmaDevice> device_;
  domain::Container container_;
  std::unique_ptr<domain::ApiOnlyDomain> domain_;
  std::optional<DmaCache> cache_;
  std::optional<testing::DmaParty> user_;
};

TEST_P(MappersTest, TheDeviceSeesTheGuestsBytes) {
  const auto all = Use(0x100000, 16 * kPageSize);
  const auto backwards = Use(0x1000000, 8 * kPageSize);
  const auto again = Use(0x102000, 4 * kPageSize);
  ASSERT_THAT(all, IsOk());
  ASSERT_THAT(backwards, IsOk());
  ASSERT_THAT(again, IsOk());
  ExpectDeviceSeesTheGuest(*all);
  ExpectDeviceSeesTheGuest(*backwards);
  ExpectDeviceSeesTheGuest(*again);
  EXPECT_EQ(AddressIn(*again, Iova(0x103000)), AddressIn(*all, Iova(0x103000)));
}

// Lone pages, of which the mapper gets all in one call; some lie side by side in memory or for the
// device, and still go back one by one.
TEST_P(MappersTest, PagesOfABatchAreTrueAndGoBackOneByOne) {
  std::vector<Iova> pages;
  for (const uint64_t at : {0x1006000, 0x100000, 0x102000, 0x10e000, 0x1000000, 0x1004000}) {
    pages.emplace_back(at + 0x18);
  }
  std::vector<DmaAddr> addresses(pages.size());
  const auto epoch = (*user_)->map_pages(pages, Direction::kToDevice, addresses);
  ASSERT_THAT(epoch, IsOk());
  for (size_t gone = 0; gone < pages.size(); ++gone) {
    for (size_t i = gone; i < pages.size(); ++i) {
      std::array<std::byte, 64> expected;
      ASSERT_THAT(domain_->read(pages[i], expected), IsOk());
      std::array<std::byte, 64> seen;
      ASSERT_TRUE(device_->read(addresses[i], seen)) << i;
      EXPECT_EQ(seen, expected) << i;
    }
    EXPECT_THAT((*user_)->unmap_pages({&pages[gone], 1}, Direction::kToDevice, *epoch), IsOk());
    if (device_->faults()) {
      EXPECT_FALSE(IsSeen(addresses[gone])) << gone;
    }
    ExpectMappedPages(pages.size() - gone - 1);
  }
  EXPECT_EQ(domain_->counters().unique_pages, 0u);
}

TEST_P(MappersTest, AddressesStayTrueAsLongAsTheyAreUsed) {
  const auto use = Use(0x100000, 4 * kPageSize);
  ASSERT_THAT(use, IsOk());
  {
    const auto other = Use(0x102000, 8 * kPageSize);
    ASSERT_THAT(other, IsOk());
  }
  ExpectDeviceSeesTheGuest(*use);
}

TEST_P(MappersTest, WhatTheVmmTookAwayIsOutOfReach) {
  const Iova gone(0x1003000);
  const auto use = Use(0x1000000, 8 * kPageSize);
  ASSERT_THAT(use, IsOk());
  const std::vector<MappedRun> runs(use->runs().begin(), use->runs().end());
  const DmaAddr old_address = *AddressIn(*use, gone);
  ExpectDeviceSeesTheGuest(*use);  // so that an IOMMU would remember
  ASSERT_THAT(container_.unmap(gone, kPageSize), IsOk());
  EXPECT_THAT(user_->told, ElementsAre(MakeRange(gone.value(), kPageSize)));
  EXPECT_FALSE(use->is_valid());
  std::byte byte;
  EXPECT_THAT(use->read(Iova(0x1000000), {&byte, 1}), FailsWith(ErrorCode::kRevoked));
  EXPECT_EQ(cache_->address_of(gone), std::nullopt);
  EXPECT_THAT(cache_->iovas_of(old_address), IsEmpty());
  EXPECT_THAT(Use(gone.value(), kPageSize), FailsWith(ErrorCode::kNotMapped));
  ExpectMappedPages(7);
  EXPECT_EQ(domain_->counters().unique_pages, 7u);
  for (const MappedRun& run : runs) {
    for (uint64_t at = 0; at < run.iova.size(); at += kPageSize) {
      if (run.iova.start() + at == gone) continue;
      EXPECT_TRUE(IsSeen(run.address + at)) << at;
      EXPECT_EQ(cache_->address_of(run.iova.start() + at), run.address + at);
    }
  }
  if (device_->faults()) {
    EXPECT_FALSE(IsSeen(old_address));
  }
}

TEST_P(MappersTest, OtherMemoryAtTheSameIovaIsWhatTheDeviceSees) {
  auto use = Use(0x1000000, 8 * kPageSize);
  ASSERT_THAT(use, IsOk());
  ASSERT_THAT(container_.unmap(Iova(0x1003000), kPageSize), IsOk());
  ASSERT_THAT(container_.map(ram_.map_request(0x1003000, BytesIn(50), kPageSize)), IsOk());
  EXPECT_FALSE(use->is_valid()) << "it does not come back with the memory";
  const auto other = Use(0x1003000, kPageSize);
  ASSERT_THAT(other, IsOk());
  ExpectDeviceSeesTheGuest(*other);
  std::vector<std::byte> seen(kPageSize);
  ASSERT_TRUE(device_->read(*AddressIn(*other, Iova(0x1003000)), seen));
  EXPECT_EQ(std::memcmp(seen.data(), ram_.at(BytesIn(50)), kPageSize), 0);
  use->reset();  // lets go of nothing that is used anew
  EXPECT_TRUE(other->is_valid());
  ExpectMappedPages(1);
  ExpectDeviceSeesTheGuest(*other);
}

TEST_P(MappersTest, NothingIsLeftAfterTheLastUse) {
  { ASSERT_THAT(Use(0x100000, 16 * kPageSize), IsOk()); }
  const std::set<std::string_view> since_creation = {"cuts", "imports", "vulkan_calls"};
  for (const auto& [name, value] : device_->mapper().figures()) {
    if (!since_creation.contains(name)) {
      EXPECT_EQ(value, 0u) << name;
    }
  }
  EXPECT_EQ(domain_->counters().unique_pages, 0u);
}

INSTANTIATE_TEST_SUITE_P(All, MappersTest, ::testing::ValuesIn(kKinds),
                         [](const auto& kind) { return std::string(kind.param.name); });

TEST(IommuRowTest, ScatteredGuestPagesAreOneRunForTheDevice) {
  GuestRam ram(64 * kPageSize);
  IommuDevice device;
  domain::Container container;
  auto domain = domain::ApiOnlyDomain::Create({}, domain::MakeNonePinBackend(), nullptr, nullptr);
  ASSERT_THAT(domain, IsOk());
  ASSERT_THAT(container.attach(domain->get()), IsOk());
  for (uint64_t i = 0; i < 8; ++i) {
    ASSERT_THAT(container.map(ram.map_request(BytesIn(i), BytesIn(40 - 2 * i), kPageSize)), IsOk());
  }
  {
    DmaCache cache(domain->get(), &device.mapper());
    testing::DmaParty user(&cache);
    const auto use = user->map(MakeRange(0, 8 * kPageSize), Direction::kBidirectional);
    ASSERT_THAT(use, IsOk());
    EXPECT_EQ(use->runs().size(), 1u);
  }
  ASSERT_THAT(container.detach(domain->get()), IsOk());
}

}  // namespace
}  // namespace mvgpu::dma
