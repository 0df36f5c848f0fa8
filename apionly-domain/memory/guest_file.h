#pragma once

#include <sys/stat.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/base/unique_fd.h"

namespace mvgpu::domain {

// A page's identity is its backing: this file, and the index of the page within it. The same page
// may be seen at several IOVAs, through several containers and in several processes.
struct FileIdentity {
  uint64_t device = 0;
  uint64_t inode = 0;

  bool operator==(const FileIdentity&) const = default;
  template <typename H>
  friend H AbslHashValue(H h, const FileIdentity& id) {
    return H::combine(std::move(h), id.device, id.inode);
  }
};

// One file of guest RAM, mapped once as a whole.
//
// The VMM owns the file and may be hostile: unless it was sealed (F_SEAL_SHRINK) it can be
// truncated at any time, and touching a page that has gone raises SIGBUS. So nobody dereferences a
// pointer into it but CopyGuarded(), which answers instead; host_address() exists for that, and for
// mappers and pin back ends, which hand it on to the kernel or to a GPU driver.
//
// Thread-safe: immutable after creation.
class GuestFile {
 public:
  // Takes the descriptor, maps the whole file shared. Errors: kInvalid (not a regular file, empty),
  // kSystem.
  static Result<std::unique_ptr<GuestFile>> Create(UniqueFd fd);
  static Result<std::unique_ptr<GuestFile>> Create(UniqueFd fd, const struct stat& status);
  ~GuestFile();
  GuestFile(const GuestFile&) = delete;
  GuestFile& operator=(const GuestFile&) = delete;

  // Identity without mapping anything. Errors: kSystem when fstat fails, kInvalid when not a
  // regular file.
  static Result<FileIdentity> IdentityOf(int fd);
  static FileIdentity IdentityOf(const struct stat& status) {
    return {status.st_dev, status.st_ino};
  }
  // fstat() of guest memory. Errors: as IdentityOf().
  static Result<struct stat> Inspect(int fd);

  const FileIdentity& identity() const { return identity_; }
  uint64_t size() const { return size_; }  // bytes that are mapped, whole blocks
  uint64_t pages() const { return PagesIn(size_); }
  uint64_t block_size() const { return block_size_; }  // 4096, or the huge page size on hugetlbfs
  bool is_writable() const { return writable_; }
  bool is_sealed_against_shrinking() const { return sealed_; }
  int fd() const { return fd_.get(); }

  // The address of a byte of the file in this process, for mlock, io_uring, Vulkan imports; not to
  // be dereferenced. REQUIRES: offset < size().
  std::byte* host_address(uint64_t offset) const { return base_ + offset; }

 private:
  GuestFile(UniqueFd fd, FileIdentity identity, std::byte* base, uint64_t size, uint64_t block_size,
            bool writable, bool sealed);

  const UniqueFd fd_;
  const FileIdentity identity_;
  std::byte* const base_;
  const uint64_t size_;
  const uint64_t block_size_;
  const bool writable_;
  const bool sealed_;
};

}  // namespace mvgpu::domain
