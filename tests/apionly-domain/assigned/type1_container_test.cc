// What type1 answers, against a fake of its calls. tests/vm runs the same class on the real one.
#include "apionly-domain/assigned/type1_container.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <linux/vfio.h>

#include <bit>
#include <string>

#include "tests/fakes/fake_vfio_kernel.h"
#include "tests/fakes/guest_ram.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::domain {
namespace {

using testing::FailsWith;
using testing::FakeVfioKernel;
using ::testing::HasSubstr;
using testing::IsOk;
using testing::IsOkAndHolds;
using testing::MakeRange;

std::byte* Host(uint64_t address) { return std::bit_cast<std::byte*>(address); }

class Type1ContainerTest : public ::testing::Test {
 protected:
  Result<std::unique_ptr<Type1Container>> Open(const std::string& group = "7") {
    return Type1Container::Create(group, std::make_unique<FakeVfioKernel>(kernel_));
  }
  std::unique_ptr<Type1Container> MustOpen() {
    auto container = Open();
    EXPECT_THAT(container, IsOk());
    return std::move(*container);
  }
  std::shared_ptr<FakeVfioKernel::State> kernel_ = std::make_shared<FakeVfioKernel::State>();
};

TEST_F(Type1ContainerTest, ReadsWhatTheIommuCanDo) {
  kernel_->ranges = {{0x1000, 0x7fffffff}, {1ull << 32, (1ull << 48) - 1}};
  const auto container = MustOpen();
  EXPECT_THAT(container->usable_ranges(),
              ::testing::ElementsAre(MakeRange(0x1000, 0x7ffff000),
                                     MakeRange(1ull << 32, (1ull << 48) - (1ull << 32))));
  EXPECT_EQ(container->page_sizes(), 1ull << 12 | 1ull << 21 | 1ull << 30);
  EXPECT_THAT(container->available_mappings(), IsOkAndHolds(65535u));
}

TEST_F(Type1ContainerTest, AKernelThatDoesNotSayGetsTheLeastThatX86Has) {
  kernel_->has_caps = false;
  const auto container = MustOpen();
  EXPECT_EQ(container->usable_ranges().size(), 2u);
  EXPECT_THAT(container->available_mappings(), IsOkAndHolds(UINT64_MAX));
}

TEST_F(Type1ContainerTest, MapsWithTheRightsThatAreAskedFor) {
  const auto container = MustOpen();
  ASSERT_THAT(container->map(MakeRange(0x10000, 0x2000), Host(0x700000), Access::kRead), IsOk());
  ASSERT_THAT(container->map(MakeRange(0x20000, 0x1000), Host(0x900000), Access::kReadWrite),
              IsOk());
  ASSERT_EQ(kernel_->mappings.size(), 2u);
  EXPECT_EQ(kernel_->mappings[0x10000].size, 0x2000u);
  EXPECT_EQ(kernel_->mappings[0x10000].vaddr, 0x700000u);
  EXPECT_EQ(kernel_->mappings[0x10000].flags, uint32_t{VFIO_DMA_MAP_FLAG_READ});
  EXPECT_EQ(kernel_->mappings[0x20000].flags,
            uint32_t{VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE});
  EXPECT_THAT(container->available_mappings(), IsOkAndHolds(65533u));
  EXPECT_THAT(container->unmap(MakeRange(0x10000, 0x2000)), IsOk());
  EXPECT_EQ(kernel_->mappings.size(), 1u);
}

TEST_F(Type1ContainerTest, UnmapsOfWhatIsNotOneMappingAreErrors) {
  const auto container = MustOpen();
  ASSERT_THAT(container->map(MakeRange(0x10000, 0x2000), Host(0x700000), Access::kRead), IsOk());
  EXPECT_THAT(container->unmap(MakeRange(0x10000, 0x1000)), FailsWith(ErrorCode::kWouldSplit));
  EXPECT_THAT(container->unmap(MakeRange(0x40000, 0x1000)), FailsWith(ErrorCode::kNotMapped));
  EXPECT_EQ(kernel_->mappings.size(), 1u);
}

TEST_F(Type1ContainerTest, EveryReasonNotToMapHasItsCodeAndRemedy) {
  const auto container = MustOpen();
  const struct {
    int sys_errno;
    ErrorCode code;
    const char* says;
  } cases[] = {
      {ENOMEM, ErrorCode::kLimit, "RLIMIT_MEMLOCK"},
      {ENOSPC, ErrorCode::kLimit, "dma_entry_limit"},
      {EEXIST, ErrorCode::kOverlap, "already"},
      {EINVAL, ErrorCode::kInvalid, "not inside"},
      {EFAULT, ErrorCode::kTruncated, "not there"},
      {EPERM, ErrorCode::kPermission, "may not reach"},
      {EIO, ErrorCode::kSystem, "Input/output"},
  };
  for (const auto& one : cases) {
    kernel_->ioctl_errno[VFIO_IOMMU_MAP_DMA] = one.sys_errno;
    const auto done = container->map(MakeRange(0x10000, 0x2000), Host(0x700000), Access::kRead);
    ASSERT_THAT(done, FailsWith(one.code));
    EXPECT_THAT(done.error().message(), HasSubstr(one.says));
    EXPECT_THAT(done.error().message(), HasSubstr("8192 bytes at device iova 0x10000"));
  }
}

TEST_F(Type1ContainerTest, OverlapsAndTooManyMappingsAreTheKernelsAnswers) {
  kernel_->entry_limit = 1;
  const auto container = MustOpen();
  ASSERT_THAT(container->map(MakeRange(0x10000, 0x2000), Host(0x700000), Access::kRead), IsOk());
  EXPECT_THAT(container->map(MakeRange(0x11000, 0x2000), Host(0x700000), Access::kRead),
              FailsWith(ErrorCode::kOverlap));
  EXPECT_THAT(container->map(MakeRange(0x40000, 0x2000), Host(0x700000), Access::kRead),
              FailsWith(ErrorCode::kLimit));
}

TEST_F(Type1ContainerTest, WhatIsMissingIsNamed) {
  const struct {
    const char* path;
    int sys_errno;
    ErrorCode code;
    const char* says;
  } cases[] = {
      {"/dev/vfio/vfio", ENOENT, ErrorCode::kSystem, "vfio_iommu_type1"},
      {"/dev/vfio/7", ENOENT, ErrorCode::kSystem, "vfio-pci"},
      {"/dev/vfio/7", EBUSY, ErrorCode::kBusy, "another process"},
  };
  for (const auto& one : cases) {
    kernel_->open_errno = {{one.path, one.sys_errno}};
    const auto container = Open();
    ASSERT_THAT(container, FailsWith(one.code));
    EXPECT_THAT(container.error().message(), HasSubstr(one.says));
  }
}

TEST_F(Type1ContainerTest, AGroupThatIsNotViableIsRefused) {
  kernel_->is_viable = false;
  const auto container = Open();
  ASSERT_THAT(container, FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(container.error().message(), HasSubstr("/sys/kernel/iommu_groups/7/devices"));
}

TEST_F(Type1ContainerTest, AnotherApiVersionIsRefused) {
  kernel_->api_version = 1;
  EXPECT_THAT(Open(), FailsWith(ErrorCode::kInvalid));
}

TEST_F(Type1ContainerTest, CallsThatFailAreSystemErrors) {
  for (const unsigned long request :
       {VFIO_GROUP_GET_STATUS, VFIO_GROUP_SET_CONTAINER, VFIO_SET_IOMMU, VFIO_IOMMU_GET_INFO}) {
    kernel_->ioctl_errno = {{request, EIO}};
    EXPECT_THAT(Open(), FailsWith(ErrorCode::kSystem));
  }
}

TEST_F(Type1ContainerTest, GivesTheDevicesOfItsGroup) {
  const auto container = MustOpen();
  const auto device = container->open_device("0000:00:03.0");
  ASSERT_THAT(device, IsOk());
  EXPECT_TRUE(device->is_valid());
  EXPECT_EQ(kernel_->opened_device, "0000:00:03.0");
  kernel_->ioctl_errno = {{VFIO_GROUP_GET_DEVICE_FD, ENODEV}};
  EXPECT_THAT(container->open_device("0000:00:04.0"), FailsWith(ErrorCode::kSystem));
}

}  // namespace
}  // namespace mvgpu::domain
