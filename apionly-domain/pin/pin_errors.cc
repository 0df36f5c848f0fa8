#include "apionly-domain/pin/pin_errors.h"

#include <fmt/format.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <fstream>
#include <optional>
#include <string>

#include "apionly-domain/accounting/process_info.h"

namespace mvgpu::domain {

namespace {

KernelCounters OwnKernelCounters() {
  const auto self = CurrentProcess();
  if (!self) return {};
  return KernelCountersOf(*self).value_or(KernelCounters{});
}

std::string FirstWordOf(const char* path) {
  std::ifstream file(path);
  std::string word = "unknown";
  file >> word;
  return word;
}

std::optional<Error> TruncatedError(const GuestFile& file, PageRun pages) {
  struct stat status = {};
  if (fstat(file.fd(), &status) != 0 ||
      static_cast<uint64_t>(status.st_size) >= BytesIn(pages.end())) {
    return std::nullopt;
  }
  return Error(ErrorCode::kTruncated,
               fmt::format("cannot pin file pages {}-{}: guest memory was truncated to {} bytes",
                           pages.first, pages.end() - 1, status.st_size));
}

std::optional<Error> NoHugePagesError(const GuestFile& file, PageRun pages) {
  if (file.block_size() == kPageSize) return std::nullopt;
  return Error(ErrorCode::kLimit,
               fmt::format("cannot pin file pages {}-{}: no huge page of {} bytes can be had; "
                           "vm.nr_hugepages is {}, raise it",
                           pages.first, pages.end() - 1, file.block_size(),
                           FirstWordOf("/proc/sys/vm/nr_hugepages")));
}

rlim_t MemlockLimit() {
  struct rlimit limit = {};
  getrlimit(RLIMIT_MEMLOCK, &limit);
  return limit.rlim_cur;
}

}  // namespace

Error MlockError(int sys_errno, const GuestFile& file, PageRun pages, uint64_t new_pages) {
  if (auto truncated = TruncatedError(file, pages)) return *std::move(truncated);
  if (auto no_huge_pages = NoHugePagesError(file, pages)) return *std::move(no_huge_pages);
  const uint64_t locked = OwnKernelCounters().vm_lck_kb * 1024;
  const uint64_t wanted = BytesIn(new_pages);
  const rlim_t limit = MemlockLimit();
  if (limit != RLIM_INFINITY && locked + wanted > limit) {
    return Error(
        ErrorCode::kLimit,
        fmt::format("cannot pin {} more bytes: {} are locked and RLIMIT_MEMLOCK is {}; raise it to "
                    "at least {} (systemd LimitMEMLOCK=, ulimit -l) or use --pin=none",
                    wanted, locked, limit, locked + wanted));
  }
  if (sys_errno == ENOMEM) {
    return Error(ErrorCode::kLimit,
                 fmt::format("cannot pin {} more bytes with {} locked: this process has no memory "
                             "areas left, vm.max_map_count is {}; raise it or use --pin=io-uring",
                             wanted, locked, FirstWordOf("/proc/sys/vm/max_map_count")));
  }
  return Error::System(sys_errno, fmt::format("mlock of {} bytes with {} locked", wanted, locked));
}

Error IoUringPinError(int sys_errno, const GuestFile& file, PageRun pages) {
  if (auto truncated = TruncatedError(file, pages)) return *std::move(truncated);
  const uint64_t pinned = OwnKernelCounters().vm_pin_kb * 1024;
  const uint64_t wanted = BytesIn(pages.count);
  const rlim_t limit = MemlockLimit();
  if (sys_errno == ENOMEM && limit != RLIM_INFINITY) {
    return Error(
        ErrorCode::kLimit,
        fmt::format("cannot pin {} more bytes: this process has pinned {} and RLIMIT_MEMLOCK is "
                    "{}, which io_uring compares with the sum over all processes of this user; "
                    "raise it above {} (systemd LimitMEMLOCK=, ulimit -l), give the process "
                    "CAP_IPC_LOCK, or use --pin=mlock or --pin=none",
                    wanted, pinned, limit, pinned + wanted));
  }
  if (sys_errno == EFAULT || sys_errno == EOPNOTSUPP) {
    if (auto no_huge_pages = NoHugePagesError(file, pages)) return *std::move(no_huge_pages);
    return Error::System(sys_errno,
                         fmt::format("io_uring cannot pin file pages {}-{}; it takes memfd, tmpfs "
                                     "and hugetlbfs files only, use --pin=mlock for others",
                                     pages.first, pages.end() - 1));
  }
  return Error::System(sys_errno,
                       fmt::format("io_uring buffer of {} bytes with {} pinned", wanted, pinned));
}

Error IoUringSetupError(int sys_errno) {
  switch (sys_errno) {
    case ENOSYS:
    case EPERM:
    case EACCES:
      return Error::System(
          sys_errno,
          fmt::format("this process may not use io_uring: kernel.io_uring_disabled is {} and must "
                      "be 0, the kernel needs CONFIG_IO_URING, and a container's seccomp filter "
                      "must allow io_uring_setup and io_uring_register; or use --pin=mlock",
                      FirstWordOf("/proc/sys/kernel/io_uring_disabled")));
    case EMFILE:
    case ENFILE:
      return Error::System(sys_errno,
                           "io_uring for pins; raise the limit of open files "
                           "(systemd LimitNOFILE=, ulimit -n)");
    default:
      return Error::System(sys_errno, "io_uring for pins; use --pin=mlock");
  }
}

namespace {

std::string DeviceMapping(IovaRange iova) {
  return fmt::format("cannot map {} bytes at device iova {:#x}", iova.size(), iova.start().value());
}

// What type1 and iommufd answer alike.
Error DeviceMapError(int sys_errno, const std::string& what) {
  switch (sys_errno) {
    case EEXIST:
      return Error(ErrorCode::kOverlap,
                   fmt::format("{}: something is mapped in these iovas already", what));
    case EINVAL:
    case EOVERFLOW:
      return Error(ErrorCode::kInvalid,
                   fmt::format("{}: not whole pages of the iommu, or not inside the iovas that it "
                               "translates",
                               what));
    case EFAULT:
      return Error(ErrorCode::kTruncated,
                   fmt::format("{}: the memory behind it is not there (any more)", what));
    case EPERM:
      return Error(ErrorCode::kPermission,
                   fmt::format("{}: the device may not reach that memory that way", what));
    default:
      return Error::System(sys_errno, what);
  }
}

}  // namespace

Error Type1MapError(int sys_errno, IovaRange iova) {
  const std::string what = DeviceMapping(iova);
  switch (sys_errno) {
    case ENOMEM: {
      const uint64_t locked = OwnKernelCounters().vm_lck_kb * 1024;
      const rlim_t limit = MemlockLimit();
      if (limit == RLIM_INFINITY) {
        return Error(ErrorCode::kLimit,
                     fmt::format("{}: the kernel is out of memory for it; {} bytes are locked and "
                                 "RLIMIT_MEMLOCK is unlimited",
                                 what, locked));
      }
      return Error(ErrorCode::kLimit,
                   fmt::format("{}: {} bytes are locked and RLIMIT_MEMLOCK is {}; raise it to at "
                               "least {} (systemd LimitMEMLOCK=, ulimit -l) or give the process "
                               "CAP_IPC_LOCK",
                               what, locked, limit, locked + iova.size()));
    }
    case ENOSPC:
      return Error(ErrorCode::kLimit,
                   fmt::format("{}: the container has its most mappings, {}; raise "
                               "vfio_iommu_type1.dma_entry_limit",
                               what,
                               FirstWordOf("/sys/module/vfio_iommu_type1/parameters/"
                                           "dma_entry_limit")));
    default:
      return DeviceMapError(sys_errno, what);
  }
}

Error IommufdMapError(int sys_errno, IovaRange iova) {
  const std::string what = DeviceMapping(iova);
  if (sys_errno != ENOMEM) return DeviceMapError(sys_errno, what);
  const uint64_t pinned = OwnKernelCounters().vm_pin_kb * 1024;
  const rlim_t limit = MemlockLimit();
  if (limit == RLIM_INFINITY) {
    return Error(ErrorCode::kLimit,
                 fmt::format("{}: the kernel is out of memory for it; {} bytes are pinned and "
                             "RLIMIT_MEMLOCK is unlimited",
                             what, pinned));
  }
  return Error(
      ErrorCode::kLimit,
      fmt::format("{}: this process has pinned {} bytes and RLIMIT_MEMLOCK is {}, which "
                  "iommufd compares with the sum over all processes of this user; raise it "
                  "above {} (systemd LimitMEMLOCK=, ulimit -l) or give the process "
                  "CAP_IPC_LOCK",
                  what, pinned, limit, pinned + iova.size()));
}

}  // namespace mvgpu::domain
