#include "apionly-domain/accounting/runtime_dir.h"

#include <dirent.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <thread>

namespace mvgpu::domain {

namespace {

constexpr std::string_view kSuffix = ".ledger";
constexpr auto kLockTimeout = std::chrono::seconds(5);

Result<UniqueFd> OpenDirectory(const std::string& path) {
  UniqueFd fd(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  if (fd.is_valid()) return fd;
  const int error = errno;
  if (error == ENOTDIR || error == ELOOP) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("runtime directory {} is not a directory, or a symbolic link", path));
  }
  return FailSystem(error, fmt::format("cannot open runtime directory {}", path));
}

}  // namespace

std::optional<std::string> NormalizedUuid(std::string_view uuid) {
  if (uuid.size() != 36) return std::nullopt;
  std::string normalized(uuid);
  for (size_t i = 0; i < normalized.size(); ++i) {
    char& c = normalized[i];
    if (i == 8 || i == 13 || i == 18 || i == 23) {
      if (c != '-') return std::nullopt;
      continue;
    }
    if (c >= 'A' && c <= 'F') c = static_cast<char>(c - 'A' + 'a');
    if (!((c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'))) return std::nullopt;
  }
  return normalized;
}

std::string LedgerFileName(const std::string& vm_uuid) { return vm_uuid + std::string(kSuffix); }

Result<RuntimeDir> RuntimeDir::OpenOrCreate(const std::string& path) {
  if (::mkdir(path.c_str(), 0700) != 0 && errno != EEXIST) {
    return FailSystem(errno, fmt::format("cannot make runtime directory {}", path));
  }
  MVGPU_ASSIGN_OR_RETURN(UniqueFd fd, OpenDirectory(path));
  struct stat st = {};
  if (::fstat(fd.get(), &st) != 0) return FailSystem(errno, fmt::format("cannot stat {}", path));
  if (st.st_uid != ::geteuid()) {
    return Fail(ErrorCode::kPermission,
                fmt::format("runtime directory {} belongs to user {}, not to user {}", path,
                            st.st_uid, ::geteuid()));
  }
  if ((st.st_mode & 0022) != 0) {
    return Fail(
        ErrorCode::kPermission,
        fmt::format("runtime directory {} has mode {:04o}: others may write; chmod it to 0700",
                    path, st.st_mode & 07777));
  }
  return RuntimeDir(std::move(fd), path, st.st_uid);
}

Result<RuntimeDir> RuntimeDir::OpenForReading(const std::string& path) {
  MVGPU_ASSIGN_OR_RETURN(UniqueFd fd, OpenDirectory(path));
  struct stat st = {};
  if (::fstat(fd.get(), &st) != 0) return FailSystem(errno, fmt::format("cannot stat {}", path));
  if (st.st_uid != ::geteuid() && ::geteuid() != 0) {
    return Fail(ErrorCode::kPermission,
                fmt::format("runtime directory {} belongs to user {}, not to user {}", path,
                            st.st_uid, ::geteuid()));
  }
  return RuntimeDir(std::move(fd), path, st.st_uid);
}

Result<UniqueFd> RuntimeDir::open_file(const std::string& name, int flags) const {
  // O_NONBLOCK: a fifo in the file's place would keep us waiting for a writer.
  UniqueFd file(::openat(fd_.get(), name.c_str(), flags | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  struct stat st = {};
  const int error = file.is_valid() && ::fstat(file.get(), &st) == 0 ? 0 : errno;
  if (error == ELOOP || error == EISDIR || error == ENXIO || (error == 0 && !S_ISREG(st.st_mode))) {
    return Fail(ErrorCode::kCorrupt, fmt::format("{} is not a regular file", path_of(name)));
  }
  if (error == EACCES || error == EPERM) {
    return Fail(ErrorCode::kPermission,
                fmt::format("{} may not be opened by user {}", path_of(name), ::geteuid()));
  }
  if (error != 0) return FailSystem(error, fmt::format("cannot open {}", path_of(name)));
  if (st.st_uid != owner_) {
    return Fail(ErrorCode::kPermission,
                fmt::format("{} belongs to user {}, its directory to user {}", path_of(name),
                            st.st_uid, owner_));
  }
  return file;
}

bool RuntimeDir::leads_to(const std::string& name, int file) const {
  struct stat by_name = {};
  struct stat by_fd = {};
  return ::fstatat(fd_.get(), name.c_str(), &by_name, AT_SYMLINK_NOFOLLOW) == 0 &&
         ::fstat(file, &by_fd) == 0 && by_name.st_dev == by_fd.st_dev &&
         by_name.st_ino == by_fd.st_ino;
}

Result<std::vector<std::string>> RuntimeDir::ledgers() const {
  // A description of its own: readdir() moves its offset.
  UniqueFd copy(::openat(fd_.get(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!copy.is_valid()) return FailSystem(errno, fmt::format("cannot open {}", path_));
  const std::unique_ptr<DIR, int (*)(DIR*)> dir(::fdopendir(copy.get()), &::closedir);
  if (dir == nullptr) return FailSystem(errno, fmt::format("cannot list {}", path_));
  copy.release();  // now the stream's
  std::vector<std::string> uuids;
  while (const dirent* entry = ::readdir(dir.get())) {
    const std::string_view name(entry->d_name);
    if (!name.ends_with(kSuffix)) continue;
    const std::string_view stem = name.substr(0, name.size() - kSuffix.size());
    // Only names that Open() would make: others are not ours.
    if (const auto uuid = NormalizedUuid(stem); uuid && *uuid == stem) uuids.push_back(*uuid);
  }
  std::sort(uuids.begin(), uuids.end());
  return uuids;
}

Result<UniqueFd> RuntimeDir::lock() const {
  // A description of its own, so that threads exclude each other as well.
  UniqueFd file(::openat(fd_.get(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!file.is_valid()) return FailSystem(errno, fmt::format("cannot open {}", path_));
  const auto deadline = std::chrono::steady_clock::now() + kLockTimeout;
  while (::flock(file.get(), LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK && errno != EINTR) {
      return FailSystem(errno, fmt::format("cannot lock {}", path_));
    }
    if (std::chrono::steady_clock::now() > deadline) {
      return Fail(
          ErrorCode::kBusy,
          fmt::format("another process has kept {} locked for 5 s; is one stopped?", path_));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return file;
}

}  // namespace mvgpu::domain
