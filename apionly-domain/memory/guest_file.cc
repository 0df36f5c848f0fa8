#include "apionly-domain/memory/guest_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <linux/magic.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>
#include <mutex>

namespace mvgpu::domain {

namespace {

// Where this thread's guarded copy goes on when a page turns out to be gone.
thread_local sigjmp_buf* fault_target = nullptr;
struct sigaction previous_sigbus_action;

void OnSigbus(int signal, siginfo_t* info, void* context) {
  if (fault_target != nullptr) siglongjmp(*fault_target, 1);
  // Not a guarded copy: whoever was there before, or the default, has the word.
  if ((previous_sigbus_action.sa_flags & SA_SIGINFO) != 0) {
    previous_sigbus_action.sa_sigaction(signal, info, context);
  } else if (previous_sigbus_action.sa_handler != SIG_DFL &&
             previous_sigbus_action.sa_handler != SIG_IGN) {
    previous_sigbus_action.sa_handler(signal);
  } else {
    ::signal(SIGBUS, SIG_DFL);
    raise(SIGBUS);
  }
}

void InstallSigbusHandler() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action = {};
    action.sa_sigaction = OnSigbus;
    action.sa_flags = SA_SIGINFO;
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, &previous_sigbus_action);
  });
}

// One access for a whole word, so that ring indices and the like are never seen half-written.
template <typename Word>
bool CopyWord(void* destination, const void* source) {
  if ((std::bit_cast<uintptr_t>(destination) | std::bit_cast<uintptr_t>(source)) % sizeof(Word) !=
      0) {
    return false;
  }
  *static_cast<volatile Word*>(destination) = *static_cast<const volatile Word*>(source);
  return true;
}

void CopyBytes(void* destination, const void* source, size_t size) {
  switch (size) {
    case 2:
      if (CopyWord<uint16_t>(destination, source)) return;
      break;
    case 4:
      if (CopyWord<uint32_t>(destination, source)) return;
      break;
    case 8:
      if (CopyWord<uint64_t>(destination, source)) return;
      break;
    default:
      break;
  }
  std::memcpy(destination, source, size);
}

// siglongjmp() left the handler for good, and the signal blocked. Done here and not by sigsetjmp(),
// which would have to save the mask with a system call for every copy.
void UnblockSigbus() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGBUS);
  pthread_sigmask(SIG_UNBLOCK, &signals, nullptr);
}

// A copy that returns false instead of raising SIGBUS.
[[gnu::noinline]] bool GuardedCopy(void* destination, const void* source, size_t size) {
  sigjmp_buf target;
  if (sigsetjmp(target, /*savemask=*/0) != 0) {
    fault_target = nullptr;
    UnblockSigbus();
    return false;
  }
  fault_target = &target;
  std::atomic_signal_fence(std::memory_order_seq_cst);  // the copy stays between the two stores
  CopyBytes(destination, source, size);
  std::atomic_signal_fence(std::memory_order_seq_cst);
  fault_target = nullptr;
  return true;
}

Result<struct stat> StatRegularFile(int fd) {
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

uint64_t BlockSizeOf(int fd) {
  struct statfs filesystem = {};
  if (fstatfs(fd, &filesystem) == 0 && filesystem.f_type == HUGETLBFS_MAGIC) {
    return static_cast<uint64_t>(filesystem.f_bsize);
  }
  return kPageSize;
}

}  // namespace

Result<FileIdentity> GuestFile::IdentityOf(int fd) {
  MVGPU_ASSIGN_OR_RETURN(const struct stat status, StatRegularFile(fd));
  return FileIdentity{status.st_dev, status.st_ino};
}

Result<std::unique_ptr<GuestFile>> GuestFile::Create(UniqueFd fd) {
  MVGPU_ASSIGN_OR_RETURN(const struct stat status, StatRegularFile(fd.get()));
  if (status.st_size <= 0) return Fail(ErrorCode::kInvalid, "guest memory file is empty");
  const uint64_t block_size = BlockSizeOf(fd.get());
  const uint64_t size =
      (static_cast<uint64_t>(status.st_size) + block_size - 1) & ~(block_size - 1);

  const int open_mode = fcntl(fd.get(), F_GETFL) & O_ACCMODE;
  if (open_mode == O_WRONLY) {
    return Fail(ErrorCode::kPermission,
                "guest memory file was opened write-only; open it read-write");
  }
  const bool writable = open_mode == O_RDWR;
  void* base = mmap(nullptr, size, writable ? PROT_READ | PROT_WRITE : PROT_READ,
                    MAP_SHARED | MAP_NORESERVE, fd.get(), 0);
  if (base == MAP_FAILED) {
    return FailSystem(errno, fmt::format("mmap of {} bytes of guest memory", size));
  }
  InstallSigbusHandler();
  const int seals = fcntl(fd.get(), F_GET_SEALS);  // fails for other files than memfds
  const FileIdentity identity{status.st_dev, status.st_ino};
  return std::unique_ptr<GuestFile>(new GuestFile(std::move(fd), identity,
                                                  static_cast<std::byte*>(base), size, block_size,
                                                  writable, seals >= 0 && (seals & F_SEAL_SHRINK)));
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

GuestFile::~GuestFile() { munmap(base_, size_); }

Result<void> GuestFile::CheckBounds(uint64_t offset, uint64_t length) const {
  const auto end = CheckedAdd(offset, length);
  if (end && *end <= size_) return {};
  return Fail(ErrorCode::kInvalid,
              fmt::format("access to {} bytes at offset {:#x} of a file of {} bytes", length,
                          offset, size_));
}

Error GuestFile::TruncatedError(uint64_t offset) const {
  struct stat status = {};
  fstat(fd_.get(), &status);
  return Error(
      ErrorCode::kTruncated,
      fmt::format("guest memory was truncated to {} bytes while offset {:#x} is in use; seal it "
                  "against shrinking",
                  status.st_size, offset));
}

Result<void> GuestFile::read(uint64_t offset, std::span<std::byte> destination) const {
  MVGPU_RETURN_IF_ERROR(CheckBounds(offset, destination.size()));
  if (!GuardedCopy(destination.data(), base_ + offset, destination.size())) {
    return tl::unexpected<Error>(TruncatedError(offset));
  }
  return {};
}

Result<void> GuestFile::write(uint64_t offset, std::span<const std::byte> source) {
  MVGPU_RETURN_IF_ERROR(CheckBounds(offset, source.size()));
  if (!writable_) return Fail(ErrorCode::kPermission, "write to guest memory that is read-only");
  if (!GuardedCopy(base_ + offset, source.data(), source.size())) {
    return tl::unexpected<Error>(TruncatedError(offset));
  }
  return {};
}

}  // namespace mvgpu::domain
