#pragma once

#include <liburing.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#include "apionly-domain/base/check.h"
#include "apionly-domain/base/error.h"

namespace mvgpu::bench {

// The system calls alone that pin and let go: what is left when a domain keeps no books. By number,
// since sanitizers replace mlock() by nothing.
class BareMlock {
 public:
  void pin_and_release(std::byte* start, uint64_t size) {
    MVGPU_CHECK(syscall(SYS_mlock, start, size) == 0 && syscall(SYS_munlock, start, size) == 0);
  }
};

// The same with one slot of a ring's table of registered buffers, as a storage server that keeps
// its ring for nothing else would do it.
class BareBuffers {
 public:
  // Errors: kSystem when this process may not use io_uring.
  static Result<std::unique_ptr<BareBuffers>> Create() {
    auto made = std::unique_ptr<BareBuffers>(new BareBuffers);
    const int failed = made->Open();
    if (failed != 0) return FailSystem(-failed, "io_uring with a table of buffers");
    return made;
  }
  ~BareBuffers() {
    if (open_) io_uring_queue_exit(&ring_);
  }
  BareBuffers(const BareBuffers&) = delete;
  BareBuffers& operator=(const BareBuffers&) = delete;

  void pin_and_release(std::byte* start, uint64_t size) {
    const iovec buffer{start, size};
    const iovec none{nullptr, 0};
    MVGPU_CHECK(Update(buffer) == 1 && Update(none) == 1);
  }

 private:
  BareBuffers() = default;
  int Open() {
    const int failed = io_uring_queue_init(1, &ring_, IORING_SETUP_R_DISABLED);
    if (failed != 0) return failed;
    open_ = true;
    return io_uring_register_buffers_sparse(&ring_, 1);
  }
  int Update(const iovec& buffer) {
    return io_uring_register_buffers_update_tag(&ring_, 0, &buffer, nullptr, 1);
  }

  io_uring ring_ = {};
  bool open_ = false;
};

// What a mapping cannot do without: a descriptor of its own, and the memory in view.
inline void MapAndUnmapBare(int fd, uint64_t size) {
  const int own = dup(fd);
  void* base = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, own, 0);
  MVGPU_CHECK(own >= 0 && base != MAP_FAILED);
  munmap(base, size);
  close(own);
}

}  // namespace mvgpu::bench
