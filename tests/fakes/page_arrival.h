#pragma once

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <utility>

#include "apionly-domain/base/address.h"
#include "apionly-domain/base/check.h"
#include "apionly-domain/base/unique_fd.h"

namespace mvgpu::testing {

// A page of shared memory that is not there yet: who touches it waits, as for a page that the
// kernel is moving, while `arrives` runs on another thread; then it is there, and zero.
// userfaultfd(2).
class PageArrival {
 public:
  // Null where the kernel does not let this process do that.
  static std::unique_ptr<PageArrival> Create(std::byte* page, std::function<void()> arrives) {
    // Without O_NONBLOCK poll() says nothing.
    UniqueFd fd(static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK)));
    uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_MISSING_SHMEM, .ioctls = 0};
    if (!fd.is_valid() || ioctl(fd.get(), UFFDIO_API, &api) != 0) return nullptr;
    uffdio_register wanted = {.range = {.start = std::bit_cast<uint64_t>(page), .len = kPageSize},
                              .mode = UFFDIO_REGISTER_MODE_MISSING,
                              .ioctls = 0};
    if (ioctl(fd.get(), UFFDIO_REGISTER, &wanted) != 0) return nullptr;
    return std::unique_ptr<PageArrival>(
        new PageArrival(std::move(fd), wanted.range, std::move(arrives)));
  }
  ~PageArrival() {
    const char byte = 0;
    MVGPU_CHECK(write(stop_[1], &byte, 1) == 1);
    thread_.join();
    close(stop_[0]);
    close(stop_[1]);
  }
  PageArrival(const PageArrival&) = delete;
  PageArrival& operator=(const PageArrival&) = delete;

  int waits() const { return waits_; }

 private:
  PageArrival(UniqueFd fd, uffdio_range page, std::function<void()> arrives)
      : fd_(std::move(fd)), page_(page), arrives_(std::move(arrives)) {
    MVGPU_CHECK(pipe2(stop_, O_CLOEXEC) == 0);
    thread_ = std::thread([this] { Serve(); });
  }
  void Serve() {
    pollfd waits[] = {{fd_.get(), POLLIN, 0}, {stop_[0], POLLIN, 0}};
    while (true) {
      MVGPU_CHECK(poll(waits, 2, -1) > 0);
      if (waits[1].revents != 0) return;
      uffd_msg message = {};
      if (read(fd_.get(), &message, sizeof message) != sizeof message) continue;  // gone already
      ++waits_;
      arrives_();
      uffdio_zeropage zero = {.range = page_, .mode = 0, .zeropage = 0};
      MVGPU_CHECK(ioctl(fd_.get(), UFFDIO_ZEROPAGE, &zero) == 0);
    }
  }

  const UniqueFd fd_;
  const uffdio_range page_;
  const std::function<void()> arrives_;
  int stop_[2];
  std::atomic<int> waits_ = 0;
  std::thread thread_;
};

}  // namespace mvgpu::testing
