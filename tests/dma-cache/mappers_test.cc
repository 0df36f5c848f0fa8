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
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/assigned/software_iommu.h"
#include "apionly-domain/container.h"
#include "dma-cache/dma_cache.h"
#include "dma-cache/iommu_mapper.h"
#include "dma-cache/physical_mapper.h"
#include "tests/fakes/dma_party.h"
#include "tests/fakes/guest_ram.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::dma {
namespace {

using testing::GuestRam;
using testing::IsOk;
using testing::MakeRange;

// A mapper with the device behind it: where the device ends up at an address, null at a fault.
struct Device {
  std::unique_ptr<domain::AssignedSpace> space;
  std::unique_ptr<Mapper> mapper;
  std::function<std::byte*(DmaAddr)> follow;
  bool can_revoke = false;
};

Result<Device> MakeNone(GuestRam&) {
  return Device{nullptr, MakeNoneMapper(),
                [](DmaAddr address) { return std::bit_cast<std::byte*>(address.value()); }, false};
}

// The device's own way to physical memory: a frame is the page of this test's view of RAM that the
// kernel says is in it.
Result<Device> MakePhysical(GuestRam& ram) {
  MVGPU_ASSIGN_OR_RETURN(std::unique_ptr<Mapper> mapper, PhysicalMapper::Create());
  auto follow = [&ram](DmaAddr address) -> std::byte* {
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
  return Device{nullptr, std::move(mapper), std::move(follow), false};
}

Result<Device> MakeIommu(GuestRam&) {
  auto iommu = std::make_unique<domain::SoftwareIommu>();
  domain::SoftwareIommu* const eye = iommu.get();
  auto space =
      std::make_unique<domain::AssignedSpace>(std::move(iommu), domain::AssignedSpace::Options{});
  auto mapper = std::make_unique<IommuMapper>(space.get());
  auto follow = [eye](DmaAddr address) {
    return eye->translate(Iova(address.value()), domain::Access::kRead);
  };
  return Device{std::move(space), std::move(mapper), std::move(follow), true};
}

struct Kind {
  const char* name;
  Result<Device> (*make)(GuestRam&);
};

class MappersTest : public ::testing::TestWithParam<Kind> {
 protected:
  void SetUp() override {
    ram_.fill_pattern();
    auto device = GetParam().make(ram_);
    if (!device) GTEST_SKIP() << device.error().message();
    device_.emplace(std::move(*device));
    auto domain =
        domain::ApiOnlyDomain::Create({}, domain::MakeMlockPinBackend(), nullptr, nullptr);
    ASSERT_THAT(domain, IsOk());
    domain_ = std::move(*domain);
    ASSERT_THAT(container_.attach(domain_.get()), IsOk());
    cache_.emplace(domain_.get(), device_->mapper.get());
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
        const std::byte* seen = device_->follow(run.address + at);
        ASSERT_NE(seen, nullptr) << "a fault";
        EXPECT_EQ(std::memcmp(seen, guest.data(), guest.size()), 0);
      }
    }
  }

  GuestRam ram_{64 * kPageSize};
  std::optional<Device> device_;
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
      const std::byte* seen = device_->follow(addresses[i]);
      ASSERT_NE(seen, nullptr) << i;
      EXPECT_EQ(std::memcmp(seen, expected.data(), expected.size()), 0) << i;
    }
    EXPECT_THAT((*user_)->unmap_pages({&pages[gone], 1}, Direction::kToDevice, *epoch), IsOk());
    if (device_->can_revoke) {
      EXPECT_EQ(device_->follow(addresses[gone]), nullptr) << gone;
    }
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
  const auto use = Use(0x1000000, 8 * kPageSize);
  ASSERT_THAT(use, IsOk());
  const std::vector<MappedRun> runs(use->runs().begin(), use->runs().end());
  ExpectDeviceSeesTheGuest(*use);  // so that an IOMMU would remember
  ASSERT_THAT(container_.unmap(Iova(0x1003000), kPageSize), IsOk());
  EXPECT_FALSE(use->is_valid());
  if (!device_->can_revoke) return;
  for (const MappedRun& run : runs) {
    for (uint64_t at = 0; at < run.iova.size(); at += kPageSize) {
      const bool gone = run.iova.start() + at == Iova(0x1003000);
      EXPECT_EQ(device_->follow(run.address + at) == nullptr, gone) << at;
    }
  }
}

TEST_P(MappersTest, NothingIsLeftAfterTheLastUse) {
  { ASSERT_THAT(Use(0x100000, 16 * kPageSize), IsOk()); }
  for (const auto& [name, value] : device_->mapper->figures()) {
    if (name == "cuts") continue;
    EXPECT_EQ(value, 0u) << name;
  }
  EXPECT_EQ(domain_->counters().unique_pages, 0u);
}

INSTANTIATE_TEST_SUITE_P(All, MappersTest,
                         ::testing::Values(Kind{"none", MakeNone}, Kind{"physical", MakePhysical},
                                           Kind{"iommu", MakeIommu}),
                         [](const auto& kind) { return std::string(kind.param.name); });

TEST(IommuRowTest, ScatteredGuestPagesAreOneRunForTheDevice) {
  GuestRam ram(64 * kPageSize);
  auto device = MakeIommu(ram);
  ASSERT_THAT(device, IsOk());
  domain::Container container;
  auto domain = domain::ApiOnlyDomain::Create({}, domain::MakeNonePinBackend(), nullptr, nullptr);
  ASSERT_THAT(domain, IsOk());
  ASSERT_THAT(container.attach(domain->get()), IsOk());
  for (uint64_t i = 0; i < 8; ++i) {
    ASSERT_THAT(container.map(ram.map_request(BytesIn(i), BytesIn(40 - 2 * i), kPageSize)), IsOk());
  }
  {
    DmaCache cache(domain->get(), device->mapper.get());
    testing::DmaParty user(&cache);
    const auto use = user->map(MakeRange(0, 8 * kPageSize), Direction::kBidirectional);
    ASSERT_THAT(use, IsOk());
    EXPECT_EQ(use->runs().size(), 1u);
  }
  ASSERT_THAT(container.detach(domain->get()), IsOk());
}

}  // namespace
}  // namespace mvgpu::dma
