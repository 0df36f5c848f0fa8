#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <string>

#include "apionly-domain/pin/pin_backend.h"
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
  std::unique_ptr<PinBackend> backend_ = MakeMlockPinBackend();
  const uint64_t before_ = KernelLockedPages();
};

TEST_F(MlockPinBackendTest, TheKernelCountsWhatItSays) {
  GuestRam ram(64 * kPageSize);
  auto file = Open(ram);
  ASSERT_EQ(backend_->granule_pages(*file), 1u);
  ASSERT_THAT(backend_->pin(*file, {8, 16}), IsOk());
  EXPECT_EQ(backend_->locked_pages(), 16u);
  EXPECT_EQ(KernelLockedPages() - before_, 16u);
  backend_->unpin(*file, {10, 2});
  EXPECT_EQ(KernelLockedPages() - before_, 14u);
  backend_->unpin(*file, {8, 2});
  backend_->unpin(*file, {12, 12});
  EXPECT_EQ(backend_->locked_pages(), 0u);
  EXPECT_EQ(KernelLockedPages(), before_);
}

TEST_F(MlockPinBackendTest, LargeFilesAreLockedInGranules) {
  GuestRam ram(512ull << 20);  // sparse; 131072 pages, so granules of 8
  auto file = Open(ram);
  ASSERT_EQ(backend_->granule_pages(*file), 8u);
  ASSERT_THAT(backend_->pin(*file, {3, 1}), IsOk());
  ASSERT_THAT(backend_->pin(*file, {5, 1}), IsOk());   // the same granule
  ASSERT_THAT(backend_->pin(*file, {15, 2}), IsOk());  // two more
  EXPECT_EQ(backend_->locked_pages(), 24u);
  EXPECT_EQ(KernelLockedPages() - before_, 24u);
  backend_->unpin(*file, {3, 1});
  EXPECT_EQ(KernelLockedPages() - before_, 24u);  // page 5 still needs it
  backend_->unpin(*file, {5, 1});
  EXPECT_EQ(KernelLockedPages() - before_, 16u);
  backend_->unpin(*file, {15, 1});
  backend_->unpin(*file, {16, 1});
  EXPECT_EQ(KernelLockedPages(), before_);
}

TEST_F(MlockPinBackendTest, ScatteredPinsDoNotRunOutOfMemoryAreas) {
  GuestRam ram(4096ull << 20);
  auto file = Open(ram);
  const uint64_t granule = backend_->granule_pages(*file);
  uint64_t pinned = 0;
  for (uint64_t page = 0; page < file->pages(); page += 2 * granule, ++pinned) {
    ASSERT_THAT(backend_->pin(*file, {page, 1}), IsOk()) << pinned;
    if (pinned == 4000) break;  // enough to show the way they grow, without taking all memory
  }
  EXPECT_EQ(KernelLockedPages() - before_, 4001 * granule);
  for (uint64_t page = 0, i = 0; i <= 4000; page += 2 * granule, ++i)
    backend_->unpin(*file, {page, 1});
  EXPECT_EQ(KernelLockedPages(), before_);
}

TEST_F(MlockPinBackendTest, ATruncatedFileIsNamedAsTheCause) {
  GuestRam ram(16 * kPageSize, /*seals=*/0);
  auto file = Open(ram);
  ASSERT_EQ(ftruncate(ram.fd(), 4 * kPageSize), 0);
  EXPECT_THAT(backend_->pin(*file, {8, 2}), FailsWith(ErrorCode::kTruncated));
  EXPECT_EQ(backend_->locked_pages(), 0u);
  EXPECT_EQ(KernelLockedPages(), before_);
  EXPECT_THAT(backend_->pin(*file, {0, 4}), IsOk());
  backend_->unpin(*file, {0, 4});
}

// Exit code 0 when a pin beyond RLIMIT_MEMLOCK is refused and a raise of the limit lets a retry
// succeed. The limit binds only without CAP_IPC_LOCK, so this runs in a child that gives root up.
[[noreturn]] void PinBeyondTheLimitThenRaiseIt(PinBackend& backend) {
  GuestRam ram(64 * kPageSize);
  auto file = GuestFile::Create(ram.duplicate());
  const rlimit low{16 * kPageSize, 64 * kPageSize};
  if (!file || setrlimit(RLIMIT_MEMLOCK, &low) != 0) _exit(10);
  if (geteuid() == 0 && setuid(65534) != 0) _exit(10);
  auto refused = backend.pin(**file, {0, 32});
  if (refused || refused.error().code() != ErrorCode::kLimit) _exit(11);
  std::fprintf(stderr, "%s\n", refused.error().message().c_str());
  const rlimit high{64 * kPageSize, 64 * kPageSize};
  if (setrlimit(RLIMIT_MEMLOCK, &high) != 0) _exit(12);
  _exit(backend.pin(**file, {0, 32}) ? 0 : 13);
}

TEST_F(MlockPinBackendTest, TheKernelsLimitIsExplainedAndARaiseLetsARetrySucceed) {
  EXPECT_EXIT(PinBeyondTheLimitThenRaiseIt(*backend_), ::testing::ExitedWithCode(0),
              "RLIMIT_MEMLOCK is 65536; raise it to at least 131072");
}

}  // namespace
}  // namespace mvgpu::domain
