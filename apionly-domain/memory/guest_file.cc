#include "apionly-domain/memory/guest_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include <cstdint>

#include "apionly-domain/memory/guarded_copy.h"

namespace mvgpu::domain {

namespace {

// Only hugetlbfs and tmpfs with huge pages have large blocks; of these the first cannot map less.
uint64_t BlockSizeOf(int fd, const struct stat& status) {
  struct statfs filesystem = {};
  if (static_cast<uint64_t>(status.st_blksize) > kPageSize && fstatfs(fd, &filesystem) == 0 &&
      filesystem.f_type == HUGETLBFS_MAGIC) {
    return static_cast<uint64_t>(filesystem.f_bsize);
  }
  return kPageSize;
}

// How much is mapped: a page more than the file has, which nobody touches. So no other file begins
// where this one ends, and what is contiguous in host memory is of one file. Not on hugetlbfs,
// where mapping more than the file has makes the file larger.
uint64_t MappedBytes(uint64_t size, uint64_t block_size) {
  return block_size == kPageSize ? size + kPageSize : size;
}

// Shared, and writable if the descriptor is. One system call for the common case.
Result<std::pair<std::byte*, bool>> MapShared(int fd, uint64_t size) {
  bool writable = true;
  void* base = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  if (base == MAP_FAILED && (errno == EACCES || errno == EPERM)) {
    writable = false;
    base = mmap(nullptr, size, PROT_READ, MAP_SHARED | MAP_NORESERVE, fd, 0);
  }
  if (base == MAP_FAILED) {
    return FailSystem(errno, fmt::format("mmap of {} bytes of guest memory (opened {})", size,
                                         errno == EACCES ? "write-only" : "for reading"));
  }
  return std::pair(static_cast<std::byte*>(base), writable);
}

}  // namespace

Result<struct stat> GuestFile::Inspect(int fd) {
  struct stat status = {};
  if (fstat(fd, &status) != 0) return FailSystem(errno, "fstat of guest memory");
  if (!S_ISREG(status.st_mode)) {
    return Fail(
        ErrorCode::kInvalid,
        fmt::format("guest memory must be a memfd or a regular file, not file type {:#o}; use "
                    "memory-backend-memfd,share=on",
                    status.st_mode & S_IFMT));
  }
  return status;
}

Result<FileIdentity> GuestFile::IdentityOf(int fd) {
  MVGPU_ASSIGN_OR_RETURN(const struct stat status, Inspect(fd));
  return IdentityOf(status);
}

Result<std::unique_ptr<GuestFile>> GuestFile::Create(UniqueFd fd) {
  MVGPU_ASSIGN_OR_RETURN(const struct stat status, Inspect(fd.get()));
  return Create(std::move(fd), status);
}

Result<std::unique_ptr<GuestFile>> GuestFile::Create(UniqueFd fd, const struct stat& status) {
  if (status.st_size <= 0) return Fail(ErrorCode::kInvalid, "guest memory file is empty");
  const uint64_t block_size = BlockSizeOf(fd.get(), status);
  const uint64_t size =
      (static_cast<uint64_t>(status.st_size) + block_size - 1) & ~(block_size - 1);
  MVGPU_ASSIGN_OR_RETURN(const auto mapped, MapShared(fd.get(), MappedBytes(size, block_size)));
  InstallSigbusHandler();
  const int seals = fcntl(fd.get(), F_GET_SEALS);  // fails for other files than memfds
  return std::unique_ptr<GuestFile>(new GuestFile(std::move(fd), IdentityOf(status), mapped.first,
                                                  size, block_size, mapped.second,
                                                  seals >= 0 && (seals & F_SEAL_SHRINK)));
}

GuestFile::GuestFile(UniqueFd fd, FileIdentity identity, std::byte* base, uint64_t size,
                     uint64_t block_size, bool writable, bool sealed)
    : fd_(std::move(fd)),
      identity_(identity),
      base_(base),
      size_(size),
      block_size_(block_size),
      writable_(writable),
      sealed_(sealed) {}

GuestFile::~GuestFile() { munmap(base_, MappedBytes(size_, block_size_)); }

}  // namespace mvgpu::domain
