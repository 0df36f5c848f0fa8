// What iommufd answers, against a fake of its calls that looks at every field as the kernel does.
#include "apionly-domain/assigned/iommufd_container.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <algorithm>
#include <bit>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "apionly-domain/accounting/process_info.h"
#include "apionly-domain/assigned/assigned_domain.h"
#include "apionly-domain/assigned/assigned_space.h"
#include "apionly-domain/container.h"
#include "tests/apionly-domain/ledger_fixture.h"
#include "tests/fakes/fake_iommufd_kernel.h"
#include "tests/fakes/guest_ram.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::domain {
namespace {

using testing::FailsWith;
using testing::FakeIommufdKernel;
using testing::GuestRam;
using ::testing::HasSubstr;
using testing::IsOk;
using testing::MakeRange;

class IommufdContainerTest : public LedgerFixture {
 protected:
  Result<std::unique_ptr<IommufdContainer>> Open(
      const std::string& device = FakeIommufdKernel::kDevice) {
    return IommufdContainer::Create(device, std::make_unique<FakeIommufdKernel>(kernel_));
  }
  std::unique_ptr<IommufdContainer> MustOpen() {
    auto container = Open();
    EXPECT_THAT(container, IsOk());
    return std::move(*container);
  }
  Result<void> Map(IommufdContainer& container, uint64_t iova, uint64_t size, uint64_t offset = 0,
                   Access access = Access::kReadWrite) {
    return container.map(MakeRange(iova, size), ram_.at(offset), access);
  }
  // What the device sees.
  const std::map<uint64_t, FakeIommufdKernel::Area>& Areas() const {
    return kernel_->address_spaces.at(kernel_->attached);
  }

  GuestRam ram_{64 * kPageSize};
  std::shared_ptr<FakeIommufdKernel::State> kernel_ = std::make_shared<FakeIommufdKernel::State>();
};

TEST_F(IommufdContainerTest, UsesTheRangesOfTheDeviceThatIsAttached) {
  kernel_->ranges = {{0x1000, 0x7fffffff}, {1ull << 32, (1ull << 48) - 1}};
  const auto container = MustOpen();
  EXPECT_TRUE(kernel_->is_bound);
  EXPECT_NE(kernel_->attached, 0u);
  EXPECT_THAT(container->usable_ranges(),
              ::testing::ElementsAre(MakeRange(0x1000, 0x7ffff000),
                                     MakeRange(1ull << 32, (1ull << 48) - (1ull << 32))));
  EXPECT_EQ(container->page_sizes(), 1ull << 12 | 1ull << 21 | 1ull << 30);
  EXPECT_NE(fcntl(container->device(), F_GETFD), -1);
}

TEST_F(IommufdContainerTest, AsksAgainWhereThereAreMoreRanges) {
  kernel_->ranges.clear();
  for (uint64_t i = 0; i < 40; ++i) kernel_->ranges.push_back({i << 32, (i << 32) + 0xffffff});
  const auto container = MustOpen();
  ASSERT_EQ(container->usable_ranges().size(), 40u);
  EXPECT_EQ(container->usable_ranges().back(), MakeRange(39ull << 32, 0x1000000));
}

TEST_F(IommufdContainerTest, AKernelThatNeverHasEnoughRoomIsAnError) {
  kernel_->always_more_ranges = true;
  EXPECT_THAT(Open(), FailsWith(ErrorCode::kSystem));
}

TEST_F(IommufdContainerTest, MapsWithTheRightsThatAreAskedFor) {
  const auto container = MustOpen();
  ASSERT_THAT(Map(*container, 0x10000, 0x2000, 0x3000, Access::kRead), IsOk());
  ASSERT_THAT(Map(*container, 0x20000, 0x1000, 0x9000, Access::kWrite), IsOk());
  ASSERT_THAT(Map(*container, 0x30000, 0x1000, 0x5000), IsOk());
  ASSERT_EQ(Areas().size(), 3u);
  EXPECT_EQ(Areas().at(0x10000).length, 0x2000u);
  EXPECT_EQ(Areas().at(0x10000).user_va, std::bit_cast<uint64_t>(ram_.at(0x3000)));
  EXPECT_EQ(Areas().at(0x10000).flags, uapi::kIoasMapFixedIova | uapi::kIoasMapReadable);
  EXPECT_EQ(Areas().at(0x20000).flags, uapi::kIoasMapFixedIova | uapi::kIoasMapWriteable);
  EXPECT_EQ(Areas().at(0x30000).flags,
            uapi::kIoasMapFixedIova | uapi::kIoasMapReadable | uapi::kIoasMapWriteable);
  EXPECT_THAT(container->unmap(MakeRange(0x10000, 0x2000)), IsOk());
  EXPECT_EQ(Areas().size(), 2u);
}

TEST_F(IommufdContainerTest, WhatCannotBeMappedIsTheKernelsAnswer) {
  kernel_->limit_pages = 3;
  const auto container = MustOpen();
  ASSERT_THAT(Map(*container, 0x10000, 0x2000), IsOk());
  EXPECT_THAT(Map(*container, 0x11000, 0x1000), FailsWith(ErrorCode::kOverlap));
  EXPECT_THAT(Map(*container, 0xfee00000, 0x1000), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(Map(*container, 1ull << 39, 0x1000), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(Map(*container, 0x40000, 0x2000), FailsWith(ErrorCode::kLimit));
  EXPECT_THAT(container->map(MakeRange(0x40000, 0x1000), std::bit_cast<std::byte*>(uint64_t{4096}),
                             Access::kRead),
              FailsWith(ErrorCode::kTruncated));
  EXPECT_EQ(Areas().size(), 1u);
  EXPECT_EQ(kernel_->pinned_pages(), 2u);
}

TEST_F(IommufdContainerTest, EveryReasonNotToMapHasItsCodeAndRemedy) {
  const auto container = MustOpen();
  const struct {
    int sys_errno;
    ErrorCode code;
    const char* says;
  } cases[] = {
      {ENOMEM, ErrorCode::kLimit, "RLIMIT_MEMLOCK"},
      {EEXIST, ErrorCode::kOverlap, "already"},
      {EINVAL, ErrorCode::kInvalid, "not inside"},
      {EOVERFLOW, ErrorCode::kInvalid, "not inside"},
      {EFAULT, ErrorCode::kTruncated, "not there"},
      {EPERM, ErrorCode::kPermission, "may not reach"},
      {EIO, ErrorCode::kSystem, "Input/output"},
  };
  for (const auto& one : cases) {
    kernel_->ioctl_errno[uapi::kIoasMap] = one.sys_errno;
    const auto done = Map(*container, 0x10000, 0x2000);
    ASSERT_THAT(done, FailsWith(one.code));
    EXPECT_THAT(done.error().message(), HasSubstr(one.says));
    EXPECT_THAT(done.error().message(), HasSubstr("8192 bytes at device iova 0x10000"));
  }
}

TEST_F(IommufdContainerTest, TheLimitIsOfAllProcessesOfTheUser) {
  struct rlimit before = {};
  ASSERT_EQ(getrlimit(RLIMIT_MEMLOCK, &before), 0);
  const struct rlimit now = {std::min<rlim_t>(before.rlim_max, 65536), before.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_MEMLOCK, &now), 0);
  kernel_->limit_pages = 1;
  const auto container = MustOpen();
  const auto done = Map(*container, 0x10000, 0x2000);
  setrlimit(RLIMIT_MEMLOCK, &before);
  ASSERT_THAT(done, FailsWith(ErrorCode::kLimit));
  EXPECT_THAT(done.error().message(), HasSubstr("sum over all processes of this user"));
  EXPECT_THAT(done.error().message(), HasSubstr("above 8192"));
}

TEST_F(IommufdContainerTest, UnmapsOfWhatIsNotOneMappingAreErrors) {
  const auto container = MustOpen();
  ASSERT_THAT(Map(*container, 0x10000, 0x2000), IsOk());
  EXPECT_THAT(container->unmap(MakeRange(0x10000, 0x1000)), FailsWith(ErrorCode::kNotMapped));
  EXPECT_THAT(container->unmap(MakeRange(0x40000, 0x1000)), FailsWith(ErrorCode::kNotMapped));
  EXPECT_EQ(Areas().size(), 1u);
  // More than one mapping goes, as the kernel has it, but it is said.
  EXPECT_THAT(container->unmap(MakeRange(0x10000, 0x3000)), FailsWith(ErrorCode::kNotMapped));
  kernel_->ioctl_errno[uapi::kIoasUnmap] = EBUSY;
  EXPECT_THAT(container->unmap(MakeRange(0x10000, 0x2000)), FailsWith(ErrorCode::kSystem));
}

TEST_F(IommufdContainerTest, WhatIsMissingIsNamedWithItsRemedy) {
  const struct {
    const char* path;
    int sys_errno;
    const char* says;
  } cases[] = {
      {"/dev/iommu", ENOENT, "CONFIG_IOMMUFD and its module; or use --iommu-group"},
      {"/dev/iommu", EACCES, "give this user access"},
      {"/dev/vfio/devices/vfio3", ENOENT, "CONFIG_VFIO_DEVICE_CDEV; or use --iommu-group"},
      {"/dev/vfio/devices/vfio3", EACCES, "give this user access"},
  };
  for (const auto& one : cases) {
    kernel_->open_errno = {{one.path, one.sys_errno}};
    const auto container = Open();
    ASSERT_THAT(container, FailsWith(ErrorCode::kSystem));
    EXPECT_EQ(container.error().sys_errno(), one.sys_errno);
    EXPECT_THAT(container.error().message(), HasSubstr(one.path));
    EXPECT_THAT(container.error().message(), HasSubstr(one.says));
  }
  EXPECT_TRUE(kernel_->requests.empty());
}

TEST_F(IommufdContainerTest, ADeviceIsNamedByItsPciAddressAndHasToBeVfios) {
  const auto refused = [this](const std::string& device, const char* says) {
    const auto container = Open(device);
    ASSERT_THAT(container, FailsWith(ErrorCode::kInvalid)) << device;
    EXPECT_THAT(container.error().message(), HasSubstr(says));
  };
  refused("0000:00:06.0", "there is no pci device 0000:00:06.0");
  for (const char* device :
       {"", "vfio3", "00:05.0", "0000:00:05.00", "0000:00:05:0", "0000:00:0g.0", "../../../../x"}) {
    refused(device, "is no pci address, give one as in /sys/bus/pci/devices/");
  }
  const std::string folder = "/sys/bus/pci/devices/0000:00:05.0/vfio-dev";
  kernel_->folders[folder] = {"power", "uevent"};
  refused(FakeIommufdKernel::kDevice, "driverctl set-override 0000:00:05.0 vfio-pci");
  kernel_->folders.erase(folder);
  refused(FakeIommufdKernel::kDevice, "driverctl set-override 0000:00:05.0 vfio-pci");
}

TEST_F(IommufdContainerTest, BindingSaysWhyNot) {
  kernel_->ioctl_errno = {{uapi::kDeviceBindIommufd, EBUSY}};
  EXPECT_THAT(Open(), FailsWith(ErrorCode::kBusy));
  kernel_->ioctl_errno = {{uapi::kDeviceBindIommufd, EINVAL}};
  EXPECT_THAT(Open(), FailsWith(ErrorCode::kInvalid));
  kernel_->ioctl_errno = {{uapi::kDeviceAttachPt, EPERM}};
  const auto container = Open();
  ASSERT_THAT(container, FailsWith(ErrorCode::kSystem));
  EXPECT_THAT(container.error().message(), HasSubstr("iommufd.allow_unsafe_interrupts"));
}

TEST_F(IommufdContainerTest, PagesOfTheIommuMayNotBeLargerThanOurs) {
  kernel_->alignment = 65536;
  const auto container = Open();
  ASSERT_THAT(container, FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(container.error().message(), HasSubstr("65536"));
  EXPECT_TRUE(kernel_->address_spaces.empty());
}

TEST_F(IommufdContainerTest, TakesDownInOrderWhatItHasMade) {
  MustOpen().reset();
  EXPECT_THAT(
      kernel_->requests,
      ::testing::ElementsAre(uapi::kDeviceBindIommufd, uapi::kIoasAlloc, uapi::kDeviceAttachPt,
                             uapi::kIoasIovaRanges, uapi::kDeviceDetachPt, uapi::kIommuDestroy));
  EXPECT_TRUE(kernel_->address_spaces.empty());
  EXPECT_EQ(kernel_->attached, 0u);
}

TEST_F(IommufdContainerTest, WhateverFailsNothingIsLeft) {
  for (const unsigned long request :
       {uapi::kDeviceBindIommufd, uapi::kIoasAlloc, uapi::kDeviceAttachPt, uapi::kIoasIovaRanges}) {
    *kernel_ = {};
    kernel_->ioctl_errno = {{request, EIO}};
    EXPECT_THAT(Open(), FailsWith(ErrorCode::kSystem));
    EXPECT_TRUE(kernel_->address_spaces.empty());
    EXPECT_EQ(kernel_->attached, 0u);
  }
}

// Cuts, and what is mapped again: what the space believes is what the kernel has.
TEST_F(IommufdContainerTest, ASpaceMayCutWhatItMapped) {
  AssignedSpace space(MustOpen(), {});
  std::mt19937 random(5);
  std::vector<IovaRange> mapped;
  for (int step = 0; step < 400; ++step) {
    if (mapped.empty() || random() % 2 == 0) {
      const uint64_t pages = 1 + random() % 8;
      const AssignedSpace::HostRun run{ram_.at(BytesIn(random() % 32)), BytesIn(pages)};
      const auto range = space.map({&run, 1}, Access::kReadWrite);
      ASSERT_THAT(range, IsOk());
      mapped.push_back(*range);
    } else {
      const IovaRange whole = mapped[random() % mapped.size()];
      std::erase(mapped, whole);
      const uint64_t pages = PagesIn(whole.size());
      const uint64_t first = random() % pages;
      const uint64_t end = first + 1 + random() % (pages - first);
      space.unmap(RangeOf({whole.start().page() + first, end - first}));
      if (first > 0) mapped.push_back(RangeOf({whole.start().page(), first}));
      if (end < pages) mapped.push_back(RangeOf({whole.start().page() + end, pages - end}));
      space.flush();
    }
    ASSERT_EQ(kernel_->pinned_pages(), space.counters().mapped_pages);
    ASSERT_EQ(Areas().size(), space.counters().mappings);
    ASSERT_EQ(space.counters().lost_pages, 0u);
  }
  EXPECT_GT(space.counters().cuts, 50u);
  for (const IovaRange& range : mapped) space.unmap(range);
  EXPECT_EQ(kernel_->pinned_pages(), 0u);
}

// The row of a device behind iommufd says what the kernel counts, in the counter where it does: a
// page at two IOVAs is two mappings to iommufd, and is pinned twice.
TEST_F(IommufdContainerTest, ADevicesRowSaysWhatTheKernelPins) {
  const auto ledger = LedgerFixture::Open();
  DevicePins device_pins;
  AssignedSpace space(MustOpen(), {.prefer_below = Iova(0)});
  Container container;
  auto nic =
      AssignedDomain::Create({.name = "nic", .device_pins = &device_pins}, &space, ledger.get());
  ASSERT_THAT(nic, IsOk());
  ASSERT_THAT(container.attach(nic->get()), IsOk());
  const auto look = [&](uint64_t locked, uint64_t unique) {
    const LedgerSnapshot snapshot = Look();
    ASSERT_EQ(snapshot.rows.size(), 1u);
    EXPECT_EQ(snapshot.rows[0].pin_backend, "iommufd");
    EXPECT_EQ(KernelCounterName(snapshot.rows[0].pin_backend), "VmPin");
    EXPECT_EQ(snapshot.rows[0].locked_pages, locked);
    EXPECT_EQ(kernel_->pinned_pages(), locked);
    EXPECT_EQ(snapshot.rows[0].unique_pages, unique);
    EXPECT_EQ(snapshot.charged_pages(), unique);
    EXPECT_EQ(device_pins.unique_pages(), unique);
  };
  ASSERT_THAT(container.map(ram_.map_request(0x100000, 0, BytesIn(16))), IsOk());
  look(16, 16);
  ASSERT_THAT(container.map(ram_.map_request(0x200000, BytesIn(8), BytesIn(16))), IsOk());
  look(32, 24);
  ASSERT_THAT(container.unmap(Iova(0x100000), BytesIn(16)), IsOk());
  look(16, 16);
  ASSERT_THAT(container.unmap_all(), IsOk());
  look(0, 0);
  ASSERT_THAT(container.detach(nic->get()), IsOk());
}

}  // namespace
}  // namespace mvgpu::domain
