#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <string>
#include <utility>

#include "apionly-domain/base/address.h"
#include "apionly-domain/base/check.h"
#include "apionly-domain/base/unique_fd.h"

namespace mvgpu::testing {

// A process that made eight pages of guest memory, as a VMM does. It lives until this goes.
class MemoryMaker {
 public:
  MemoryMaker() {
    int to_parent[2];
    int to_child[2];
    MVGPU_CHECK(pipe(to_parent) == 0 && pipe(to_child) == 0);
    child_ = fork();
    MVGPU_CHECK(child_ >= 0);
    if (child_ == 0) {
      close(to_child[1]);  // so that it sees the end when this goes
      Live(to_parent[1], to_child[0]);
    }
    close(to_parent[1]);
    close(to_child[0]);
    from_child_.reset(to_parent[0]);
    to_child_.reset(to_child[1]);
    int fd = -1;
    MVGPU_CHECK(::read(from_child_.get(), &fd, sizeof(fd)) == sizeof(fd));
    const std::string path = "/proc/" + std::to_string(child_) + "/fd/" + std::to_string(fd);
    fd_.reset(open(path.c_str(), O_RDWR | O_CLOEXEC));
    MVGPU_CHECK(fd_.is_valid());
  }
  ~MemoryMaker() { Exit(); }

  UniqueFd duplicate() const { return UniqueFd(dup(fd_.get())); }
  // The process writes this byte to the first of its pages, through its own mapping.
  void Write(char byte) {
    char done = 0;
    MVGPU_CHECK(::write(to_child_.get(), &byte, 1) == 1);
    MVGPU_CHECK(::read(from_child_.get(), &done, 1) == 1);
  }
  void Exit() {
    if (child_ < 0) return;
    to_child_.reset();
    waitpid(std::exchange(child_, -1), nullptr, 0);
  }

 private:
  [[noreturn]] static void Live(int out, int in) {
    const int fd = memfd_create("guest", 0);
    char byte = 0;
    if (fd < 0 || ftruncate(fd, BytesIn(8)) != 0) _exit(1);
    auto* memory =
        static_cast<char*>(mmap(nullptr, BytesIn(8), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
    if (::write(out, &fd, sizeof(fd)) != sizeof(fd)) _exit(1);
    while (::read(in, &byte, 1) == 1) {
      memory[0] = byte;
      if (::write(out, &byte, 1) != 1) break;
    }
    _exit(0);
  }

  pid_t child_ = -1;
  UniqueFd from_child_;
  UniqueFd to_child_;
  UniqueFd fd_;
};

}  // namespace mvgpu::testing
