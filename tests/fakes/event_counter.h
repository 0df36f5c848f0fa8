#pragma once

#include <sys/eventfd.h>
#include <unistd.h>

#include <cstdint>

#include "apionly-domain/base/check.h"
#include "apionly-domain/base/unique_fd.h"

namespace mvgpu::testing {

// An eventfd as a VMM binds it to a vector.
class EventCounter {
 public:
  explicit EventCounter(int flags = EFD_NONBLOCK) : fd_(eventfd(0, EFD_CLOEXEC | flags)) {
    MVGPU_CHECK(fd_.is_valid());
  }
  UniqueFd duplicate() const { return UniqueFd(dup(fd_.get())); }
  int fd() const { return fd_.get(); }

  // How often it was signalled since this was asked last. REQUIRES: EFD_NONBLOCK.
  uint64_t take() {
    uint64_t count = 0;
    return ::read(fd_.get(), &count, sizeof(count)) == sizeof(count) ? count : 0;
  }

 private:
  UniqueFd fd_;
};

}  // namespace mvgpu::testing
