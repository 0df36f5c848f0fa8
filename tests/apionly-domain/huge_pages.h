#pragma once

#include <fcntl.h>
#include <fmt/format.h>
#include <linux/memfd.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <fstream>
#include <string>

#include "apionly-domain/base/check.h"
#include "apionly-domain/base/unique_fd.h"

namespace mvgpu::testing {

// Huge pages of 2 MiB for a test, asked of the kernel where this process may; given back at the
// end. One test at a time has some, others wait.
class HugePages {
 public:
  static constexpr uint64_t kBytes = 2ull << 20;

  explicit HugePages(uint64_t wanted) {
    lock_.reset(open(Path("nr_hugepages").c_str(), O_RDONLY | O_CLOEXEC));
    if (lock_.is_valid()) flock(lock_.get(), LOCK_EX);
    before_ = Read("nr_hugepages");
    if (Read("free_hugepages") < wanted) {
      Write(before_ + wanted);
      changed_ = true;
    }
    are_there_ = Read("free_hugepages") >= wanted;
  }
  ~HugePages() {
    if (changed_) Write(before_);
  }
  HugePages(const HugePages&) = delete;
  HugePages& operator=(const HugePages&) = delete;

  bool are_there() const { return are_there_; }
  uint64_t free() const { return Read("free_hugepages"); }
  UniqueFd make_file(uint64_t huge_pages) const {
    UniqueFd fd(memfd_create("huge-ram", MFD_CLOEXEC | MFD_HUGETLB | (21u << MFD_HUGE_SHIFT)));
    MVGPU_CHECK(fd.is_valid() && ftruncate(fd.get(), static_cast<off_t>(huge_pages * kBytes)) == 0);
    return fd;
  }

 private:
  static std::string Path(const char* name) {
    return fmt::format("/sys/kernel/mm/hugepages/hugepages-2048kB/{}", name);
  }
  static uint64_t Read(const char* name) {
    uint64_t value = 0;
    std::ifstream(Path(name)) >> value;
    return value;
  }
  static void Write(uint64_t pages) { std::ofstream(Path("nr_hugepages")) << pages; }

  UniqueFd lock_;
  uint64_t before_ = 0;
  bool changed_ = false;
  bool are_there_ = false;
};

}  // namespace mvgpu::testing
