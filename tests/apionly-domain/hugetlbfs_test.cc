// Guest memory in huge pages: the kernel's pages are larger than ours.

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <linux/memfd.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <unistd.h>

#include <fstream>
#include <string>

#include "tests/apionly-domain/domain_fixture.h"
#include "tests/fakes/kernel_counters.h"

namespace mvgpu::domain {
namespace {

using testing::FailsWith;
using testing::IsOk;
using testing::KernelLockedPages;

constexpr uint64_t kHuge = uint64_t{2} << 20;
constexpr char kPool[] = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

class HugetlbfsTest : public DomainTest {
 protected:
  void SetUp() override {
    // One at a time: the pool is the machine's.
    lock_.reset(open(kPool, O_RDONLY | O_CLOEXEC));
    if (lock_.is_valid()) flock(lock_.get(), LOCK_EX);
    std::ifstream(kPool) >> pages_before_;
    std::ofstream(kPool) << pages_before_ + 4;
    fd_.reset(memfd_create("huge", MFD_CLOEXEC | MFD_HUGETLB | MFD_HUGE_2MB));
    if (!fd_.is_valid() || ftruncate(fd_.get(), 4 * kHuge) != 0 || !CanBeUsed()) {
      GTEST_SKIP() << "needs four huge pages of 2 MiB; as root, write to " << kPool;
    }
    DomainTest::SetUp();
    ASSERT_THAT(container_.map({Iova(0), 4 * kHuge, Access::kReadWrite, UniqueFd(dup(fd_.get()))}),
                IsOk());
  }
  void TearDown() override {
    DomainTest::TearDown();
    if (domain_ != nullptr) return;
    EXPECT_THAT(container_.unmap_all(), IsOk());
    fd_.reset();
    std::ofstream(kPool) << pages_before_;
    lock_.reset();
  }
  // Reserves the pages and gives them back.
  bool CanBeUsed() const {
    void* memory = mmap(nullptr, 4 * kHuge, PROT_READ | PROT_WRITE, MAP_SHARED, fd_.get(), 0);
    return memory != MAP_FAILED && munmap(memory, 4 * kHuge) == 0;
  }

  UniqueFd lock_;
  UniqueFd fd_;
  uint64_t pages_before_ = 0;
};

TEST_F(HugetlbfsTest, IsMappedReadAndWrittenLikeOtherMemory) {
  EXPECT_EQ(container_.mappings()[0].file->block_size(), kHuge);
  const std::vector<std::byte> news(100, std::byte{0x5a});
  ASSERT_THAT(domain_->write(Iova(kHuge - 50), news), IsOk());
  std::vector<std::byte> copy(100);
  ASSERT_THAT(domain_->read(Iova(kHuge - 50), copy), IsOk());
  EXPECT_EQ(copy, news);
}

TEST_F(HugetlbfsTest, SmallPagesOfAHugeOneArePinnedAndUnmappedOneByOne) {
  auto pin = Pin(kHuge - kPageSize, 2 * kPageSize);
  ASSERT_THAT(pin, IsOk());
  EXPECT_EQ(pin->runs().size(), 1u);
  EXPECT_EQ(PagesPinnedOnce(), 2u);
  EXPECT_THAT(container_.unmap(Iova(0), kPageSize, Container::Cut::kSplit), IsOk());
  EXPECT_THAT(Pin(0, kPageSize), FailsWith(ErrorCode::kNotMapped));
  EXPECT_THAT(Pin(kPageSize, kHuge), IsOk());
}

// The kernel does not count hugetlbfs as locked; it cannot go away either.
TEST_F(HugetlbfsTest, EveryBackEndCanPinIt) {
  for (const bool use_mlock : {true, false}) {
    SCOPED_TRACE(use_mlock);
    Start({}, use_mlock ? MakeMlockPinBackend() : MakeNonePinBackend());
    const uint64_t before = KernelLockedPages();
    auto pin = Pin(0, 4 * kHuge);
    ASSERT_THAT(pin, IsOk());
    EXPECT_EQ(domain_->counters().unique_pages, PagesIn(4 * kHuge));
    pin->reset();
    EXPECT_EQ(KernelLockedPages(), before);
    EXPECT_EQ(domain_->counters().locked_pages, 0u);
  }
}

}  // namespace
}  // namespace mvgpu::domain
