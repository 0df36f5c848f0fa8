#include "apionly-domain/accounting/ledger_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <vector>

#include "apionly-domain/accounting/ledger_reader.h"
#include "apionly-domain/accounting/ledger_view.h"

namespace mvgpu::domain {

Result<LedgerFile::Existing> LedgerFile::OpenExisting() const {
  MVGPU_ASSIGN_OR_RETURN(UniqueFd fd, dir_.open_file(name_, O_RDWR));
  struct stat st = {};
  if (::fstat(fd.get(), &st) != 0) return FailSystem(errno, "cannot stat " + path());
  if ((st.st_mode & 0077) != 0) {
    return Fail(
        ErrorCode::kPermission,
        fmt::format("{} has mode {:04o}: others may open it; if it is yours, chmod it to 0600",
                    path(), st.st_mode & 07777));
  }
  // Nothing is changed before everything in it was found to be in order.
  MVGPU_RETURN_IF_ERROR(CheckLedgerFile(fd.get(), path(), vm_uuid_));
  if (::flock(fd.get(), LOCK_EX | LOCK_NB) == 0) {
    // Nobody has it open: what is in there, its lock included, was left by processes that are dead,
    // but for rows whose owners do not know of it.
    MVGPU_ASSIGN_OR_RETURN(const bool lives, HasLivingOwner(fd.get()));
    return Existing{std::move(fd), lives ? Use::kOwners : Use::kNobody};
  }
  if (::flock(fd.get(), LOCK_SH | LOCK_NB) != 0) {
    return Fail(ErrorCode::kBusy, fmt::format("{} is locked by a program of another kind", path()));
  }
  return Existing{std::move(fd), Use::kOpen};
}

Result<bool> LedgerFile::HasLivingOwner(int fd) const {
  const std::string at = path();
  const LedgerReader reader(fd, at, vm_uuid_);
  MVGPU_ASSIGN_OR_RETURN(const std::vector<ledger_format::RowRecord> rows, reader.ReadRows());
  for (const ledger_format::RowRecord& row : rows) {
    if (ledger_format::IsRegistered(row) && LivenessOf(OwnerOf(row)) != Liveness::kDead) {
      return true;
    }
  }
  return false;
}

Result<std::unique_ptr<LedgerStore>> LedgerFile::TakePart(Existing existing) const {
  MVGPU_ASSIGN_OR_RETURN(auto memory, LedgerMemory::Map(std::move(existing.fd), path()));
  if (existing.use != Use::kOpen) {
    MVGPU_RETURN_IF_ERROR(memory->renew_lock());
    if (::flock(memory->fd(), LOCK_SH | LOCK_NB) != 0) {
      return FailSystem(errno, fmt::format("cannot share {}", path()));
    }
  }
  auto store = std::make_unique<LedgerStore>(std::move(memory), self_);
  MVGPU_RETURN_IF_ERROR(store->reclaim());
  return store;
}

Result<std::unique_ptr<LedgerStore>> LedgerFile::OpenOrCreate() const {
  auto existing = OpenExisting();
  if (!existing && existing.error().sys_errno() == ENOENT) return Create();
  if (!existing) return tl::unexpected<Error>(std::move(existing).error());
  if (existing->use != Use::kNobody) return TakePart(std::move(*existing));
  Unlink();
  return Create();
}

Result<void> LedgerFile::DropDead() const {
  MVGPU_ASSIGN_OR_RETURN(Existing existing, OpenExisting());
  MVGPU_RETURN_IF_ERROR(TakePart(std::move(existing)));
  return {};
}

Result<void> LedgerFile::RemoveUnused() const {
  MVGPU_ASSIGN_OR_RETURN(const Existing existing, OpenExisting());
  if (existing.use != Use::kNobody) {
    return Fail(ErrorCode::kBusy,
                fmt::format("{} stays: {}; end the vm's domains first", path(),
                            existing.use == Use::kOpen ? "a process has it open"
                                                       : "a process lives that holds pages of it"));
  }
  Unlink();
  return {};
}

void LedgerFile::Unlink() const { ::unlinkat(dir_.fd(), name_.c_str(), 0); }

Result<std::unique_ptr<LedgerStore>> LedgerFile::Create() const {
  const std::string hidden = "." + name_ + ".new";  // not seen by readers before it is complete
  MVGPU_ASSIGN_OR_RETURN(UniqueFd fd, CreateHidden(hidden));
  auto memory = LedgerMemory::Create(std::move(fd), path(), vm_uuid_);
  if (memory && ::renameat(dir_.fd(), hidden.c_str(), dir_.fd(), name_.c_str()) == 0) {
    return std::make_unique<LedgerStore>(std::move(*memory), self_);
  }
  const int rename_errno = errno;
  ::unlinkat(dir_.fd(), hidden.c_str(), 0);
  if (!memory) return tl::unexpected<Error>(std::move(memory).error());
  return FailSystem(rename_errno, fmt::format("cannot make {}", path()));
}

Result<UniqueFd> LedgerFile::CreateHidden(const std::string& name) const {
  ::unlinkat(dir_.fd(), name.c_str(), 0);  // of a process that died while it made one
  UniqueFd fd(
      ::openat(dir_.fd(), name.c_str(), O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600));
  if (!fd.is_valid() || ::fchmod(fd.get(), 0600) != 0 ||
      ::flock(fd.get(), LOCK_SH | LOCK_NB) != 0) {
    return FailSystem(errno, fmt::format("cannot make {}", path()));
  }
  return fd;
}

}  // namespace mvgpu::domain
