// What userfaultfd(2) tells of guest memory that goes: why a balloon tells us itself, see
// faults/balloon.h. If the kernel ever tells more, these fail, and there is something to gain.

#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <bit>
#include <cstring>
#include <optional>
#include <thread>

#include "apionly-domain/base/unique_fd.h"
#include "tests/fakes/guest_ram.h"

namespace mvgpu::domain {
namespace {

class UserfaultfdTest : public ::testing::Test {
 protected:
  static constexpr uint64_t kSize = 0x10'0000;

  void SetUp() override {
    fd_.reset(static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK)));
    if (!fd_.is_valid()) GTEST_SKIP() << "userfaultfd: " << std::strerror(errno);
    uffdio_api api{UFFD_API, UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP, 0};
    if (ioctl(fd_.get(), UFFDIO_API, &api) != 0) GTEST_SKIP() << "no events of userfaultfd";
    std::memset(ram_.at(0), 1, kSize);
    other_view_ = mmap(nullptr, kSize, PROT_READ | PROT_WRITE, MAP_SHARED, ram_.fd(), 0);
    ASSERT_NE(other_view_, MAP_FAILED);
    uffdio_register view{
        {std::bit_cast<uint64_t>(ram_.at(0)), kSize}, UFFDIO_REGISTER_MODE_MISSING, 0};
    ASSERT_EQ(ioctl(fd_.get(), UFFDIO_REGISTER, &view), 0) << std::strerror(errno);
  }
  void TearDown() override {
    if (other_view_ != nullptr) munmap(other_view_, kSize);
  }

  // Which event came of it, if any. Who causes one waits until it has been read, so without one
  // `remove` returns by itself.
  template <typename Remove>
  std::optional<int> EventOf(Remove remove) {
    std::atomic<bool> is_done{false};
    std::thread remover([&] {
      EXPECT_EQ(remove(), 0) << std::strerror(errno);
      is_done = true;
    });
    std::optional<int> event;
    while (!is_done) {
      pollfd readable{fd_.get(), POLLIN, 0};
      uffd_msg message;
      if (poll(&readable, 1, /*timeout_ms=*/10) != 1) continue;
      EXPECT_FALSE(is_done);
      if (read(fd_.get(), &message, sizeof(message)) == sizeof(message)) event = message.event;
      // From here on the remover goes on, whatever we have still to do.
    }
    remover.join();
    return event;
  }
  int PunchHole(uint64_t offset) {
    return fallocate(ram_.fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                     static_cast<off_t>(offset), 0x2000);
  }

  testing::GuestRam ram_{kSize, /*seals=*/0};
  UniqueFd fd_;
  void* other_view_ = nullptr;
};

TEST_F(UserfaultfdTest, TellsOfMadviseOnItsOwnViewAndWaitsForNobodyElse) {
  EXPECT_EQ(EventOf([&] { return madvise(ram_.at(0x1000), 0x2000, MADV_REMOVE); }),
            UFFD_EVENT_REMOVE);
  EXPECT_EQ(EventOf([&] { return madvise(ram_.at(0x8000), 0x2000, MADV_DONTNEED); }),
            UFFD_EVENT_REMOVE);
}

TEST_F(UserfaultfdTest, DoesNotTellOfWhatHappensToTheFile) {
  EXPECT_EQ(EventOf([&] { return PunchHole(0x1'0000); }), std::nullopt);
  EXPECT_EQ(EventOf([&] {
              return madvise(static_cast<std::byte*>(other_view_) + 0x2'0000, 0x2000, MADV_REMOVE);
            }),
            std::nullopt);
  EXPECT_EQ(EventOf([&] { return ftruncate(ram_.fd(), kSize / 2); }), std::nullopt);
}

}  // namespace
}  // namespace mvgpu::domain
