#include <absl/container/flat_hash_map.h>
#include <fmt/format.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <fstream>
#include <string>

#include "apionly-domain/pin/pin_backend.h"
#include "apionly-domain/pin/run_counter.h"

namespace mvgpu::domain {

namespace {

constexpr uint64_t kMaxGranulesPerFile = 16384;

// The bare system calls: the sanitizers' run-time replaces mlock() by nothing, and the kernel's
// count is what our tests believe.
long MlockPages(const void* address, size_t size) { return syscall(SYS_mlock, address, size); }
void MunlockPages(const void* address, size_t size) { syscall(SYS_munlock, address, size); }

// VmLck of this process in bytes: what the kernel counts, mlocks of others in the process included.
uint64_t LockedBytesOfProcess() {
  std::ifstream status("/proc/self/status");
  for (std::string key; status >> key;) {
    if (key == "VmLck:") {
      uint64_t kilobytes = 0;
      status >> kilobytes;
      return kilobytes * 1024;
    }
  }
  return 0;
}

Error MlockError(int sys_errno, const GuestFile& file, PageRun pages) {
  struct stat status = {};
  if (fstat(file.fd(), &status) == 0 &&
      static_cast<uint64_t>(status.st_size) < BytesIn(pages.end()) &&
      file.size() >= BytesIn(pages.end())) {
    return Error(ErrorCode::kTruncated,
                 fmt::format("cannot pin file pages {}-{}: guest memory was truncated to {} bytes",
                             pages.first, pages.end() - 1, status.st_size));
  }
  struct rlimit limit = {};
  getrlimit(RLIMIT_MEMLOCK, &limit);
  const uint64_t locked = LockedBytesOfProcess();
  if (limit.rlim_cur != RLIM_INFINITY && locked + BytesIn(pages.count) > limit.rlim_cur) {
    return Error(
        ErrorCode::kLimit,
        fmt::format("cannot pin {} more bytes: {} are locked and RLIMIT_MEMLOCK is {}; raise it to "
                    "at least {} (systemd LimitMEMLOCK=, ulimit -l) or use --pin=none",
                    BytesIn(pages.count), locked, limit.rlim_cur, locked + BytesIn(pages.count)));
  }
  return Error::System(sys_errno, fmt::format("mlock of {} bytes with {} locked already",
                                              BytesIn(pages.count), locked));
}

class MlockPinBackend final : public PinBackend {
 public:
  std::string_view name() const override { return "mlock"; }

  uint32_t granule_pages(const GuestFile& file) const override {
    const uint64_t wanted = (file.pages() + kMaxGranulesPerFile - 1) / kMaxGranulesPerFile;
    return static_cast<uint32_t>(
        std::max<uint64_t>(std::bit_ceil(wanted), PagesIn(file.block_size())));
  }

  Result<void> pin(const GuestFile& file, PageRun pages) override {
    RunCounter& pinned = pinned_[file.identity()];
    const PageRun lock = NewlyTouched(pinned, file, pages);
    if (lock.count > 0 &&
        MlockPages(file.host_address(BytesIn(lock.first)), BytesIn(lock.count)) != 0) {
      const int sys_errno = errno;
      MunlockPages(file.host_address(BytesIn(lock.first)),
                   BytesIn(lock.count));  // what it did before failing
      Error error = MlockError(sys_errno, file, lock);
      if (pinned.empty()) pinned_.erase(file.identity());
      return tl::unexpected<Error>(std::move(error));
    }
    pinned.add(pages);
    locked_pages_ += lock.count;
    return {};
  }

  void unpin(const GuestFile& file, PageRun pages) override {
    RunCounter& pinned = pinned_[file.identity()];
    pinned.remove(pages);
    const PageRun unlock = NewlyTouched(pinned, file, pages);
    if (unlock.count > 0)
      MunlockPages(file.host_address(BytesIn(unlock.first)), BytesIn(unlock.count));
    locked_pages_ -= unlock.count;
    if (pinned.empty()) pinned_.erase(file.identity());
  }

  uint64_t locked_pages() const override { return locked_pages_; }

 private:
  // The pages of all granules that `pages` touches and `pinned` does not. Only the first and the
  // last granule can be shared with other runs, since the domain pins a page once.
  PageRun NewlyTouched(const RunCounter& pinned, const GuestFile& file, PageRun pages) const {
    const uint64_t granule = granule_pages(file);
    uint64_t first = pages.first / granule * granule;
    uint64_t end = (pages.end() + granule - 1) / granule * granule;
    if (pinned.any({first, granule})) first += granule;
    if (first < end && pinned.any({end - granule, granule})) end -= granule;
    end = std::min(end, file.pages());
    return {first, end > first ? end - first : 0};
  }

  absl::flat_hash_map<FileIdentity, RunCounter> pinned_;  // every count is 1
  uint64_t locked_pages_ = 0;
};

}  // namespace

std::unique_ptr<PinBackend> MakeMlockPinBackend() { return std::make_unique<MlockPinBackend>(); }

}  // namespace mvgpu::domain
