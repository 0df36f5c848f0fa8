// The io_uring back end on the real kernel, which is the judge of what is pinned.
#include "apionly-domain/pin/io_uring_pin_backend.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstddef>
#include <string>

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
using testing::KernelPinnedPages;

class IoUringPinBackendTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto backend = MakeIoUringPinBackend();
    if (!backend) GTEST_SKIP() << backend.error().message();
    backend_ = std::move(*backend);
  }
  std::unique_ptr<GuestFile> Open(const GuestRam& ram) {
    auto file = GuestFile::Create(ram.duplicate());
    EXPECT_THAT(file, IsOk());
    return std::move(*file);
  }
  // What we say, the kernel says.
  void ExpectPinned(uint64_t pages) {
    EXPECT_EQ(backend_->locked_pages(), pages);
    EXPECT_EQ(KernelPinnedPages() - before_, pages);
  }

  std::unique_ptr<PinBackend> backend_;
  const uint64_t before_ = KernelPinnedPages();
};

TEST_F(IoUringPinBackendTest, TheKernelCountsWhatItSaysAndReleasesAtOnce) {
  GuestRam ram(64 * kPageSize);
  auto file = Open(ram);
  ASSERT_THAT(backend_->pin(*file, {8, 16}), IsOk());
  ExpectPinned(16);
  ASSERT_THAT(backend_->pin(*file, {40, 1}), IsOk());
  ExpectPinned(17);
  backend_->unpin(*file, {8, 16});
  ExpectPinned(1);
  backend_->unpin(*file, {40, 1});
  ExpectPinned(0);
  EXPECT_EQ(KernelLockedPages(), 0u) << "VmLck has no part in it";
}

TEST_F(IoUringPinBackendTest, APartOfABufferIsReleasedExactly) {
  GuestRam ram(64 * kPageSize);
  auto file = Open(ram);
  ASSERT_THAT(backend_->pin(*file, {8, 16}), IsOk());
  backend_->unpin(*file, {12, 4});  // from the middle
  ExpectPinned(12);
  backend_->unpin(*file, {8, 1});  // at the start
  ExpectPinned(11);
  backend_->unpin(*file, {23, 1});  // at the end
  ExpectPinned(10);
  ASSERT_THAT(backend_->pin(*file, {12, 4}), IsOk());
  ExpectPinned(14);
  backend_->unpin(*file, {9, 14});  // across three buffers
  ExpectPinned(0);
}

TEST_F(IoUringPinBackendTest, LongRunsAreCutIntoBuffersAndUnpinnedInAnyCut) {
  GuestRam ram(16ull << 20);
  auto file = Open(ram);
  constexpr uint64_t kBuffer = IoUringPinBackend::kMaxBufferPages;
  ASSERT_THAT(backend_->pin(*file, {100, 4 * kBuffer}), IsOk());
  ExpectPinned(4 * kBuffer);
  backend_->unpin(*file, {100 + kBuffer, 2 * kBuffer});
  ExpectPinned(2 * kBuffer);
  backend_->unpin(*file, {100, kBuffer});
  backend_->unpin(*file, {100 + 3 * kBuffer, kBuffer});
  ExpectPinned(0);
}

TEST_F(IoUringPinBackendTest, PinnedPagesStayWhereTheyAreWhenTheFileLosesThem) {
  GuestRam ram(16 * kPageSize, /*seals=*/0);
  auto file = Open(ram);
  ASSERT_THAT(backend_->pin(*file, {0, 16}), IsOk());
  ASSERT_EQ(ftruncate(ram.fd(), 4 * kPageSize), 0);
  ExpectPinned(16);
  backend_->unpin(*file, {0, 16});
  ExpectPinned(0);
}

TEST_F(IoUringPinBackendTest, MorePinsThanOneTableHasSlots) {
  GuestRam ram(1ull << 30);
  auto file = Open(ram);
  constexpr uint64_t kPins = 20000;  // a table has 16384
  for (uint64_t i = 0; i < kPins; ++i) {
    ASSERT_THAT(backend_->pin(*file, {i * 13, 1}), IsOk()) << i;
  }
  ExpectPinned(kPins);
  for (uint64_t i = 0; i < kPins; ++i) backend_->unpin(*file, {i * 13, 1});
  ExpectPinned(0);
}

TEST_F(IoUringPinBackendTest, ATruncatedFileIsNamedAsTheCause) {
  GuestRam ram(16 * kPageSize, /*seals=*/0);
  auto file = Open(ram);
  ASSERT_EQ(ftruncate(ram.fd(), 4 * kPageSize), 0);
  EXPECT_THAT(backend_->pin(*file, {8, 2}), FailsWith(ErrorCode::kTruncated));
  EXPECT_THAT(backend_->pin(*file, {0, 16}), FailsWith(ErrorCode::kTruncated));
  ExpectPinned(0);
  EXPECT_THAT(backend_->pin(*file, {0, 4}), IsOk());
  backend_->unpin(*file, {0, 4});
  ExpectPinned(0);
}

TEST_F(IoUringPinBackendTest, ReadOnlyGuestMemoryIsRefusedWithTheRemedy) {
  GuestRam ram(16 * kPageSize);
  UniqueFd fd(open(("/proc/self/fd/" + std::to_string(ram.fd())).c_str(), O_RDONLY | O_CLOEXEC));
  auto file = GuestFile::Create(std::move(fd));
  ASSERT_THAT(file, IsOk());
  const auto refused = backend_->pin(**file, {0, 1});
  ASSERT_THAT(refused, FailsWith(ErrorCode::kPermission));
  EXPECT_THAT(refused.error().message(), ::testing::HasSubstr("--pin=mlock"));
}

TEST_F(IoUringPinBackendTest, HugePagesArePinned) {
  testing::HugePages huge_pages(4);
  if (!huge_pages.are_there()) GTEST_SKIP() << "no huge pages to be had";
  auto file = GuestFile::Create(huge_pages.make_file(4));
  ASSERT_THAT(file, IsOk());
  ASSERT_THAT(backend_->pin(**file, {3, 1}), IsOk());
  EXPECT_EQ(backend_->locked_pages(), 1u);
  EXPECT_EQ(KernelPinnedPages() - before_, 512u) << "the kernel counts whole huge pages";
  ASSERT_THAT(backend_->pin(**file, {512, 1024}), IsOk());
  EXPECT_EQ(KernelPinnedPages() - before_, 3 * 512u);
  backend_->unpin(**file, {3, 1});
  backend_->unpin(**file, {512, 1024});
  ExpectPinned(0);
}

// The kernel adds up what all processes of a user have pinned, so each child is a user of its own.
void BecomeNobodyWithLimit(uint64_t pages, uint64_t hard_pages) {
  const rlimit limit{pages * kPageSize, hard_pages * kPageSize};
  if (setrlimit(RLIMIT_MEMLOCK, &limit) != 0) _exit(10);
  if (geteuid() == 0 && setuid(200000 + static_cast<uid_t>(getpid())) != 0) _exit(10);
}

struct Child {
  explicit Child(uint64_t limit, uint64_t hard_limit) {
    BecomeNobodyWithLimit(limit, hard_limit);
    auto made_file = GuestFile::Create(ram.duplicate());
    auto made_backend = MakeIoUringPinBackend();
    if (!made_file || !made_backend) _exit(10);
    file = std::move(*made_file);
    backend = std::move(*made_backend);
  }
  GuestRam ram{64 * kPageSize};
  std::unique_ptr<GuestFile> file;
  std::unique_ptr<PinBackend> backend;
};

// Exit code 0 when a pin beyond RLIMIT_MEMLOCK is refused and a raise of the limit lets a retry
// succeed.
[[noreturn]] void PinBeyondTheLimitThenRaiseIt() {
  Child child(16, 64);
  if (!child.backend->pin(*child.file, {40, 4})) _exit(11);
  const auto refused = child.backend->pin(*child.file, {0, 32});
  if (refused || refused.error().code() != ErrorCode::kLimit) _exit(12);
  std::fprintf(stderr, "%s\n", refused.error().message().c_str());
  if (child.backend->locked_pages() != 4 || KernelPinnedPages() != 4) _exit(13);
  BecomeNobodyWithLimit(64, 64);
  _exit(child.backend->pin(*child.file, {0, 32}) ? 0 : 14);
}

TEST_F(IoUringPinBackendTest, TheKernelsLimitIsExplainedAndARaiseLetsARetrySucceed) {
  EXPECT_EXIT(PinBeyondTheLimitThenRaiseIt(), ::testing::ExitedWithCode(0),
              "has pinned 16384 and RLIMIT_MEMLOCK is 65536.*raise it above 147456");
}

// A buffer that cannot be cut at the limit stays whole; its pages can be pinned again.
[[noreturn]] void UnpinAPartAtTheLimit() {
  Child child(24, 24);  // room for 16 pages and the ring, not for 12 more
  if (!child.backend->pin(*child.file, {0, 16})) _exit(11);
  child.backend->unpin(*child.file, {4, 4});
  if (child.backend->locked_pages() != 16 || KernelPinnedPages() != 16) _exit(12);
  if (!child.backend->pin(*child.file, {4, 4})) _exit(13);
  child.backend->unpin(*child.file, {0, 16});
  _exit(child.backend->locked_pages() == 0 && KernelPinnedPages() == 0 ? 0 : 14);
}

TEST_F(IoUringPinBackendTest, ABufferThatCannotBeCutAtTheLimitStaysWhole) {
  EXPECT_EXIT(UnpinAPartAtTheLimit(), ::testing::ExitedWithCode(0), "");
}

// What a container's seccomp filter or kernel.io_uring_disabled does.
[[noreturn]] void MakeItWhereIoUringIsForbidden() {
  sock_filter rules[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_io_uring_setup, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog program{std::size(rules), rules};
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 ||
      prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0) {
    _exit(10);
  }
  const auto backend = MakeIoUringPinBackend();
  if (backend || backend.error().sys_errno() != EPERM) _exit(11);
  std::fprintf(stderr, "%s\n", backend.error().message().c_str());
  _exit(0);
}

TEST_F(IoUringPinBackendTest, WhereIoUringIsForbiddenTheRemedyIsNamed) {
  EXPECT_EXIT(MakeItWhereIoUringIsForbidden(), ::testing::ExitedWithCode(0),
              "may not use io_uring: kernel.io_uring_disabled is 0.*or use --pin=mlock");
}

}  // namespace
}  // namespace mvgpu::domain
