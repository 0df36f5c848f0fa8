#pragma once

#include <sys/types.h>

#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "apionly-domain/base/error.h"
#include "apionly-domain/base/unique_fd.h"

namespace mvgpu::domain {

// "8-4-4-4-12" hexadecimal digits, in lower case; nullopt when it is not a UUID.
std::optional<std::string> NormalizedUuid(std::string_view uuid);
std::string LedgerFileName(const std::string& vm_uuid);

// The directory where the ledgers of a user's VMs lie. Other users have no business in it: it must
// belong to this user and must not be writable by others.
class RuntimeDir {
 public:
  // Makes the directory (mode 0700), not its parents. Errors: kPermission (owner, mode), kInvalid
  // (not a directory, a symbolic link), kSystem.
  static Result<RuntimeDir> OpenOrCreate(const std::string& path);
  // For reading; root may look into everybody's. ENOENT is kSystem with that errno.
  static Result<RuntimeDir> OpenForReading(const std::string& path);

  int fd() const { return fd_.get(); }
  const std::string& path() const { return path_; }
  uid_t owner() const { return owner_; }
  std::string path_of(const std::string& name) const { return path_ + "/" + name; }

  // Opens a file in here that must be a regular one of the directory's owner; never follows a link,
  // never waits. Errors: kCorrupt (something else lies there), kPermission, kSystem (ENOENT:
  // nothing is there).
  Result<UniqueFd> open_file(const std::string& name, int flags) const;
  // True when the name leads to this open file.
  bool leads_to(const std::string& name, int file) const;

  // UUIDs of all ledgers in here, sorted. Errors: kSystem.
  Result<std::vector<std::string>> ledgers() const;

  // Serialises making and removing of ledgers among processes until the result is destroyed.
  // Errors: kBusy after 5 seconds.
  Result<UniqueFd> lock() const;

 private:
  RuntimeDir(UniqueFd fd, std::string path, uid_t owner)
      : fd_(std::move(fd)), path_(std::move(path)), owner_(owner) {}

  UniqueFd fd_;
  std::string path_;
  uid_t owner_;
};

}  // namespace mvgpu::domain
