// The mlock back end on the real kernel, which is the judge of what is locked.
#include "apionly-domain/pin/mlock_pin_backend.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "tests/apionly-domain/huge_pages.h"
#include "tests/fakes/guest_ram.h"
#include "tests/fakes/kernel_counters.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::domain {
namespace {

using testing::FailsWith;
using testing::GuestRam;
using testing::IsOk;
using testing::KernelLockedPages;

class MlockPinBackendTest : public ::testing::Test {
 protected:
  std::unique_ptr<GuestFile> Open(const GuestRam& ram) {
    auto file = GuestFile::Create(ram.duplicate());
    EXPECT_THAT(file, IsOk());
    return std::move(*file);
  }
  void UseBudget(uint64_t areas) {
    backend_ = std::make_unique<MlockPinBackend>(areas, MakeKernelMemoryLocker());
  }
  // What we say, the kernel says.
  void ExpectLocked(uint64_t pages) {
    EXPECT_EQ(backend_->locked_pages(), pages);
    EXPECT_EQ(KernelLockedPages() - before_, pages);
  }
  uint64_t AllocatedPages(const GuestRam& ram) {
    struct stat status = {};
    EXPECT_EQ(fstat(ram.fd(), &status), 0);
    return static_cast<uint64_t>(status.st_blocks) / 8;
  }

  std::unique_ptr<PinBackend> backend_ = MakeMlockPinBackend();
  const uint64_t before_ = KernelLockedPages();
};

TEST_F(MlockPinBackendTest, TheKernelCountsWhatItSays) {
  GuestRam ram(64 * kPageSize);
  auto file = Open(ram);
  ASSERT_THAT(backend_->pin(*file, {8, 16}), IsOk());
  ExpectLocked(16);
  backend_->unpin(*file, {10, 2});
  ExpectLocked(14);
  backend_->unpin(*file, {8, 2});
  backend_->unpin(*file, {12, 12});
  ExpectLocked(0);
}

TEST_F(MlockPinBackendTest, LonePagesOfALargeFileAreLockedExactly) {
  GuestRam ram(64ull << 30);
  auto file = Open(ram);
  ASSERT_THAT(backend_->pin(*file, {12345, 1}), IsOk());
  ASSERT_THAT(backend_->pin(*file, {file->pages() - 1, 1}), IsOk());
  ExpectLocked(2);
  EXPECT_EQ(backend_->areas(), 2u);
  EXPECT_EQ(backend_->granule_pages(*file), 1u);
  EXPECT_EQ(AllocatedPages(ram), 2u);
  backend_->unpin(*file, {12345, 1});
  backend_->unpin(*file, {file->pages() - 1, 1});
  ExpectLocked(0);
  EXPECT_EQ(backend_->areas(), 0u);
}

TEST_F(MlockPinBackendTest, ManyFilesMayComeAndGoWhileOthersStayPinned) {
  struct Pinned {
    GuestRam ram{4 * kPageSize};
    std::unique_ptr<GuestFile> file;
  };
  std::vector<Pinned> some(200);  // more than the back end keeps in mind without pins
  for (Pinned& one : some) one.file = Open(one.ram);
  for (int round = 0; round < 2; ++round) {
    for (size_t i = 0; i < some.size(); ++i) {
      ASSERT_THAT(backend_->pin(*some[i].file, {1, 2}), IsOk());
      if (i % 3 != 0) backend_->unpin(*some[i].file, {1, 2});
    }
    ExpectLocked(67 * 2);
    for (size_t i = 0; i < some.size(); i += 3) backend_->unpin(*some[i].file, {1, 2});
    ExpectLocked(0);
  }
  EXPECT_EQ(backend_->areas(), 0u);
}

// The sizes of files in which nothing is pinned make no granule coarser.
TEST_F(MlockPinBackendTest, OnlyFilesWithPinsCountForTheGranule) {
  UseBudget(16);
  GuestRam large(16ull << 30);
  GuestRam small(16ull << 20);
  auto large_file = Open(large);
  auto small_file = Open(small);
  for (uint64_t i = 0; i < 10; ++i) ASSERT_THAT(backend_->pin(*small_file, {256 * i, 1}), IsOk());
  ASSERT_EQ(backend_->areas(), 10u) << "so many that sizes matter";
  const uint32_t alone = backend_->granule_pages(*small_file);
  ASSERT_THAT(backend_->pin(*large_file, {0, 1}), IsOk());
  backend_->unpin(*large_file, {0, 1});
  ASSERT_EQ(backend_->areas(), 10u);
  EXPECT_EQ(backend_->granule_pages(*small_file), alone);
  for (uint64_t i = 0; i < 10; ++i) backend_->unpin(*small_file, {256 * i, 1});
  ExpectLocked(0);
}

TEST_F(MlockPinBackendTest, NeighboursAreOneAreaAndItIsCutExactly) {
  GuestRam ram(64 * kPageSize);
  auto file = Open(ram);
  for (const uint64_t page : {10u, 12u, 11u, 9u, 13u}) {
    ASSERT_THAT(backend_->pin(*file, {page, 1}), IsOk());
  }
  EXPECT_EQ(backend_->areas(), 1u);
  backend_->unpin(*file, {11, 1});
  EXPECT_EQ(backend_->areas(), 2u);
  ExpectLocked(4);
  ASSERT_THAT(backend_->pin(*file, {11, 1}), IsOk());
  EXPECT_EQ(backend_->areas(), 1u);
  backend_->unpin(*file, {9, 5});
  ExpectLocked(0);
}

TEST_F(MlockPinBackendTest, ARunAroundLockedPagesLocksOnlyTheGaps) {
  GuestRam ram(64 * kPageSize);
  auto file = Open(ram);
  UseBudget(16);
  std::vector<uint64_t> lone;
  for (uint64_t page = 32; page < 48; page += 2) lone.push_back(page);
  for (const uint64_t page : lone) ASSERT_THAT(backend_->pin(*file, {page, 1}), IsOk());
  ASSERT_EQ(backend_->areas(), 8u);
  ASSERT_EQ(backend_->granule_pages(*file), 2u);
  ASSERT_THAT(backend_->pin(*file, {0, 1}), IsOk());  // the granule 0-1
  ExpectLocked(10);
  ASSERT_THAT(backend_->pin(*file, {1, 2}), IsOk());  // page 1 is in it, 2-3 is new
  ExpectLocked(12);
  backend_->unpin(*file, {0, 1});
  ExpectLocked(12);
  backend_->unpin(*file, {1, 2});
  ExpectLocked(8);
  for (const uint64_t page : lone) backend_->unpin(*file, {page, 1});
  ExpectLocked(0);
}

TEST_F(MlockPinBackendTest, AGranuleTakesInSmallerAreasAndAllocatesNothing) {
  GuestRam ram(1024 * kPageSize);
  auto file = Open(ram);
  UseBudget(16);
  for (uint64_t i = 0; i < 12; ++i) ASSERT_THAT(backend_->pin(*file, {i * 64, 1}), IsOk()) << i;
  const uint64_t granule = backend_->granule_pages(*file);
  ASSERT_GT(granule, 64u);
  const uint64_t areas = backend_->areas();
  ASSERT_THAT(backend_->pin(*file, {33, 1}), IsOk());
  EXPECT_LT(backend_->areas(), areas);
  EXPECT_EQ(KernelLockedPages() - before_, backend_->locked_pages());
  EXPECT_GE(backend_->locked_pages(), granule);
  EXPECT_EQ(AllocatedPages(ram), 13u) << "pages that nobody pinned stay unallocated";
  backend_->unpin(*file, {33, 1});
  for (uint64_t i = 0; i < 12; ++i) backend_->unpin(*file, {i * 64, 1});
  ExpectLocked(0);
  EXPECT_EQ(backend_->areas(), 0u);
}

// 32740 lone locked pages are what the kernel has memory areas for.
TEST_F(MlockPinBackendTest, AnyNumberOfScatteredPinsFitsIntoTheMemoryAreas) {
  GuestRam ram(64ull << 30);
  auto file = Open(ram);
  constexpr uint64_t kPins = 40000;
  const uint64_t stride = file->pages() / kPins;
  const auto page = [&](uint64_t i) { return i * 7919 % kPins * stride + i % 300; };
  for (uint64_t i = 0; i < kPins; ++i) {
    ASSERT_THAT(backend_->pin(*file, {page(i), 1}), IsOk()) << i;
  }
  EXPECT_LE(backend_->areas(), backend_->area_budget() * 7 / 8 + 1);
  EXPECT_EQ(KernelLockedPages() - before_, backend_->locked_pages());
  EXPECT_GE(backend_->locked_pages(), kPins);
  EXPECT_EQ(AllocatedPages(ram), kPins);
  for (uint64_t i = 0; i < kPins; ++i) backend_->unpin(*file, {page(i), 1});
  ExpectLocked(0);
}

TEST_F(MlockPinBackendTest, FilesShareTheBudget) {
  UseBudget(64);
  GuestRam first_ram(1ull << 30);
  GuestRam second_ram(4ull << 30);
  auto first = Open(first_ram);
  auto second = Open(second_ram);
  for (uint64_t i = 0; i < 500; ++i) {
    ASSERT_THAT(backend_->pin(*first, {i * 500, 1}), IsOk()) << i;
    ASSERT_THAT(backend_->pin(*second, {i * 2000, 1}), IsOk()) << i;
    ASSERT_LE(backend_->areas(), 58u);
  }
  for (uint64_t i = 0; i < 500; ++i) backend_->unpin(*first, {i * 500, 1});
  EXPECT_EQ(KernelLockedPages() - before_, backend_->locked_pages());
  for (uint64_t i = 0; i < 500; ++i) backend_->unpin(*second, {i * 2000, 1});
  ExpectLocked(0);
}

TEST_F(MlockPinBackendTest, ATruncatedFileIsNamedAsTheCause) {
  GuestRam ram(16 * kPageSize, /*seals=*/0);
  auto file = Open(ram);
  ASSERT_EQ(ftruncate(ram.fd(), 4 * kPageSize), 0);
  EXPECT_THAT(backend_->pin(*file, {8, 2}), FailsWith(ErrorCode::kTruncated));
  EXPECT_THAT(backend_->pin(*file, {0, 16}), FailsWith(ErrorCode::kTruncated));
  ExpectLocked(0);
  EXPECT_THAT(backend_->pin(*file, {0, 4}), IsOk());
  backend_->unpin(*file, {0, 4});
  ExpectLocked(0);
}

TEST_F(MlockPinBackendTest, TruncationShowsInAGranuleThatIsHeld) {
  UseBudget(16);
  GuestRam ram(256 * kPageSize, /*seals=*/0);
  auto file = Open(ram);
  for (uint64_t i = 0; i < 12; ++i) ASSERT_THAT(backend_->pin(*file, {i * 8, 1}), IsOk());
  const uint64_t granule = backend_->granule_pages(*file);
  ASSERT_GE(granule, 4u);
  ASSERT_THAT(backend_->pin(*file, {256 - granule, 1}), IsOk());
  ASSERT_EQ(ftruncate(ram.fd(), static_cast<off_t>(BytesIn(256 - granule + 1))), 0);
  EXPECT_THAT(backend_->pin(*file, {256 - granule + 2, 1}), FailsWith(ErrorCode::kTruncated));
  backend_->unpin(*file, {256 - granule, 1});
  for (uint64_t i = 0; i < 12; ++i) backend_->unpin(*file, {i * 8, 1});
  ExpectLocked(0);
}

TEST_F(MlockPinBackendTest, HugePagesAreBroughtInAndReleasedWhole) {
  testing::HugePages huge_pages(4);
  if (!huge_pages.are_there()) GTEST_SKIP() << "no huge pages to be had";
  auto file = GuestFile::Create(huge_pages.make_file(4));
  ASSERT_THAT(file, IsOk());
  const uint64_t block = PagesIn((*file)->block_size());
  EXPECT_EQ(backend_->granule_pages(**file), block);
  ASSERT_THAT(backend_->pin(**file, {3, 1}), IsOk());
  EXPECT_EQ(backend_->locked_pages(), block);
  ASSERT_THAT(backend_->pin(**file, {5, block}), IsOk());  // page 5 is held, the second block not
  EXPECT_EQ(backend_->locked_pages(), 2 * block);
  backend_->unpin(**file, {3, 1});
  EXPECT_EQ(backend_->locked_pages(), 2 * block);
  backend_->unpin(**file, {5, block});
  EXPECT_EQ(backend_->locked_pages(), 0u);
}

TEST_F(MlockPinBackendTest, WithoutFreeHugePagesTheRemedyIsNamed) {
  testing::HugePages huge_pages(1);
  if (!huge_pages.are_there()) GTEST_SKIP() << "no huge pages to be had";
  auto file = GuestFile::Create(huge_pages.make_file(huge_pages.free() + 8));
  ASSERT_THAT(file, IsOk());
  const auto refused = backend_->pin(**file, {0, (*file)->pages()});
  ASSERT_THAT(refused, FailsWith(ErrorCode::kLimit));
  EXPECT_THAT(refused.error().message(), ::testing::HasSubstr("vm.nr_hugepages"));
  EXPECT_EQ(backend_->locked_pages(), 0u);
}

// Gives root up, so that RLIMIT_MEMLOCK binds, and lowers it. For a child process.
void LimitLockedPages(uint64_t pages, uint64_t hard_pages) {
  const rlimit low{pages * kPageSize, hard_pages * kPageSize};
  if (setrlimit(RLIMIT_MEMLOCK, &low) != 0) _exit(10);
  if (geteuid() == 0 && setuid(65534) != 0) _exit(10);
}

// Exit code 0 when a pin beyond RLIMIT_MEMLOCK is refused and a raise of the limit lets a retry
// succeed. The limit binds only without CAP_IPC_LOCK, so this runs in a child that gives root up.
[[noreturn]] void PinBeyondTheLimitThenRaiseIt(PinBackend& backend) {
  GuestRam ram(64 * kPageSize);
  auto file = GuestFile::Create(ram.duplicate());
  if (!file) _exit(10);
  LimitLockedPages(16, 64);
  auto refused = backend.pin(**file, {0, 32});
  if (refused || refused.error().code() != ErrorCode::kLimit) _exit(11);
  std::fprintf(stderr, "%s\n", refused.error().message().c_str());
  LimitLockedPages(64, 64);
  _exit(backend.pin(**file, {0, 32}) ? 0 : 13);
}

TEST_F(MlockPinBackendTest, TheKernelsLimitIsExplainedAndARaiseLetsARetrySucceed) {
  EXPECT_EXIT(PinBeyondTheLimitThenRaiseIt(*backend_), ::testing::ExitedWithCode(0),
              "RLIMIT_MEMLOCK is 65536; raise it to at least 131072");
}

[[noreturn]] void PinWhereNoGranuleFits() {
  MlockPinBackend backend(16, MakeKernelMemoryLocker());
  GuestRam ram(1024 * kPageSize);
  auto file = GuestFile::Create(ram.duplicate());
  if (!file) _exit(10);
  LimitLockedPages(15, 15);
  for (uint64_t i = 0; i < 14; ++i)
    if (!backend.pin(**file, {i * 64, 1})) _exit(11);
  // The first granule is of two pages; the next ones would be too large.
  if (KernelLockedPages() != 15 || backend.locked_pages() != 15) _exit(12);
  const auto refused = backend.pin(**file, {1000, 1});
  _exit(!refused && refused.error().code() == ErrorCode::kLimit ? 0 : 13);
}

TEST_F(MlockPinBackendTest, WhereTheLimitAdmitsNoGranuleThePageAloneIsLocked) {
  EXPECT_EXIT(PinWhereNoGranuleFits(), ::testing::ExitedWithCode(0), "");
}

// Leaves this process one memory area short of its limit.
std::vector<std::byte*> UseUpMemoryAreas() {
  std::vector<std::byte*> areas;
  int protection = PROT_READ;
  for (;;) {
    void* area = mmap(nullptr, kPageSize, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (area == MAP_FAILED) break;
    areas.push_back(static_cast<std::byte*>(area));
    protection = protection == PROT_READ ? PROT_NONE : PROT_READ;  // so that they do not merge
  }
  munmap(areas.back(), kPageSize);
  areas.pop_back();
  return areas;
}

[[noreturn]] void PinWithoutMemoryAreas(PinBackend& backend) {
  GuestRam ram(64 * kPageSize);
  auto file = GuestFile::Create(ram.duplicate());
  if (!file) _exit(10);
  const std::vector<std::byte*> areas = UseUpMemoryAreas();
  auto refused = backend.pin(**file, {8, 1});
  if (refused || refused.error().code() != ErrorCode::kLimit) _exit(11);
  std::fprintf(stderr, "%s\n", refused.error().message().c_str());
  if (backend.locked_pages() != 0 || backend.areas() != 0) _exit(12);
  for (std::byte* area : areas) munmap(area, kPageSize);
  _exit(backend.pin(**file, {8, 1}) ? 0 : 13);
}

TEST_F(MlockPinBackendTest, AProcessWithoutMemoryAreasIsToldSo) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "a sanitizer needs memory areas of its own";
#endif
  EXPECT_EXIT(PinWithoutMemoryAreas(*backend_), ::testing::ExitedWithCode(0),
              "no memory areas left, vm.max_map_count is [0-9]+; raise it");
}

}  // namespace
}  // namespace mvgpu::domain
