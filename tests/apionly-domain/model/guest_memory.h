#pragma once

// The memory behind the mappings of the model check: sparse files, memory that only the VMM
// reaches, and a naive copy of all bytes to compare with.

#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <span>
#include <string>

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>

#include "apionly-domain/api_only_domain.h"
#include "tests/apionly-domain/model/naive_memory.h"
#include "tests/fakes/guest_ram.h"

namespace mvgpu::domain::model {

inline constexpr int kFiles = 3;
inline constexpr std::array<uint64_t, kFiles> kFilePages = {(uint64_t{1} << 18) + 1024, 1200, 64};
inline constexpr int kReadOnlyFile = 2;

// Bytes by page; what was never written is 0.
class NaiveBytes {
 public:
  using Page = std::array<std::byte, kPageSize>;
  Page& at(Backing page) { return pages_[page]; }  // made if it is not there
  const std::map<Backing, Page>& pages() const { return pages_; }

 private:
  std::map<Backing, Page> pages_;
};

// A VMM that answers for memory without a file; fails at the n-th call if told to.
class FakeVmm final : public RemoteMemory {
 public:
  Result<void> read(Iova iova, std::span<std::byte> destination) override {
    if (Fails()) return Fail(ErrorCode::kSystem, "fake vmm failure");
    ForEachPart(iova, destination.size(), [&](std::byte* bytes, size_t done, size_t count) {
      std::memcpy(&destination[done], bytes, count);
    });
    return {};
  }
  Result<void> write(Iova iova, std::span<const std::byte> source) override {
    if (Fails()) return Fail(ErrorCode::kSystem, "fake vmm failure");
    ForEachPart(iova, source.size(), [&](std::byte* bytes, size_t done, size_t count) {
      std::memcpy(bytes, &source[done], count);
    });
    return {};
  }
  NaiveBytes& bytes() { return bytes_; }

  uint64_t fail_at_call = 0;  // 1 = the next one; 0 = never
  bool failed = false;        // since somebody cleared it

 private:
  bool Fails() {
    if (fail_at_call == 0 || --fail_at_call != 0) return false;
    failed = true;
    return true;
  }
  template <typename Visit>
  void ForEachPart(Iova iova, size_t size, const Visit& visit) {
    for (size_t done = 0; done < size;) {
      const Iova at = iova + done;
      const size_t count = std::min<size_t>(size - done, kPageSize - at.offset_in_page());
      visit(&bytes_.at({kNoFile, at.page()})[at.offset_in_page()], done, count);
      done += count;
    }
  }
  NaiveBytes bytes_;
};

// The files, made once for all runs: they are large, and empty at the start of each run.
class GuestFiles {
 public:
  GuestFiles() {
    read_only_.reset(
        open(fmt::format("/proc/self/fd/{}", ram_[kReadOnlyFile].fd()).c_str(), O_RDONLY));
    for (size_t i = 0; i < ram_.size(); ++i) {
      struct stat status = {};
      MVGPU_CHECK(fstat(ram_[i].fd(), &status) == 0);
      inodes_[i] = status.st_ino;
    }
  }
  void Empty() {
    for (GuestRam& ram : ram_) {
      MVGPU_CHECK(fallocate(ram.fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
                            static_cast<off_t>(ram.size())) == 0);
    }
  }
  UniqueFd duplicate(int file) const {
    if (file == kReadOnlyFile) return UniqueFd(dup(read_only_.get()));
    return ram_[static_cast<size_t>(file)].duplicate();
  }
  int file_of(uint64_t inode) const {
    for (int i = 0; i < kFiles; ++i) {
      if (inodes_[static_cast<size_t>(i)] == inode) return i;
    }
    return kNoFile;
  }
  // This test's own view of a page.
  std::byte* at(Backing page) {
    return ram_[static_cast<size_t>(page.file)].at(page.page * kPageSize);
  }

 private:
  using GuestRam = testing::GuestRam;
  std::array<GuestRam, kFiles> ram_ = {GuestRam(kFilePages[0] * kPageSize),
                                       GuestRam(kFilePages[1] * kPageSize),
                                       GuestRam(kFilePages[2] * kPageSize)};
  UniqueFd read_only_;
  std::array<uint64_t, kFiles> inodes_ = {};
};

}  // namespace mvgpu::domain::model
