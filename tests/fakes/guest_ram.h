#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "apionly-domain/base/address.h"
#include "apionly-domain/base/check.h"
#include "apionly-domain/base/unique_fd.h"
#include "apionly-domain/container.h"

namespace mvgpu::testing {

// Guest RAM as a VMM has it: a memfd, with this test's own view of it.
class GuestRam {
 public:
  explicit GuestRam(uint64_t size, unsigned seals = F_SEAL_SHRINK) : size_(size) {
    fd_.reset(memfd_create("guest-ram", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    MVGPU_CHECK(fd_.is_valid() && ftruncate(fd_.get(), static_cast<off_t>(size)) == 0);
    if (seals != 0) MVGPU_CHECK(fcntl(fd_.get(), F_ADD_SEALS, seals) == 0);
    base_ = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd_.get(), 0);
    MVGPU_CHECK(base_ != MAP_FAILED);
  }
  ~GuestRam() { munmap(base_, size_); }
  GuestRam(const GuestRam&) = delete;
  GuestRam& operator=(const GuestRam&) = delete;

  uint64_t size() const { return size_; }
  int fd() const { return fd_.get(); }
  UniqueFd duplicate() const { return UniqueFd(dup(fd_.get())); }
  std::byte* at(uint64_t offset) { return static_cast<std::byte*>(base_) + offset; }
  std::span<std::byte> bytes() { return {at(0), size_}; }

  template <typename T>
  void put(uint64_t offset, const T& value) {
    std::memcpy(at(offset), &value, sizeof(value));
  }
  template <typename T>
  T get(uint64_t offset) {
    T value;
    std::memcpy(&value, at(offset), sizeof(value));
    return value;
  }
  // Bytes that say where they are, so that a copy from the wrong place shows.
  void fill_pattern() {
    for (uint64_t i = 0; i < size_; ++i)
      *at(i) = static_cast<std::byte>(i * 131 + (i >> 12) * 7 + 3);
  }

  // The request that maps [offset, offset + size) of this RAM at an IOVA.
  domain::Container::MapRequest map_request(
      uint64_t iova, uint64_t offset, uint64_t size,
      domain::Access access = domain::Access::kReadWrite) const {
    return {Iova(iova), size, access, duplicate(), offset};
  }

 private:
  UniqueFd fd_;
  uint64_t size_;
  void* base_ = nullptr;
};

inline IovaRange MakeRange(uint64_t start, uint64_t size) {
  const auto range = IovaRange::FromStartAndSize(Iova(start), size);
  MVGPU_CHECK(range.has_value());
  return *range;
}

}  // namespace mvgpu::testing
