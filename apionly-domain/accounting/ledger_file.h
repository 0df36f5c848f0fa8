#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "apionly-domain/accounting/ledger_store.h"
#include "apionly-domain/accounting/process_info.h"
#include "apionly-domain/accounting/runtime_dir.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/base/unique_fd.h"

namespace mvgpu::domain {

// The place of a VM's ledger in its directory: how the file comes, is taken part in, and goes. It
// comes and goes only with the directory locked, so nobody is left with one that was removed.
class LedgerFile {
 public:
  LedgerFile(RuntimeDir dir, std::string vm_uuid, ProcessId self)
      : dir_(std::move(dir)),
        vm_uuid_(std::move(vm_uuid)),
        name_(LedgerFileName(vm_uuid_)),
        self_(self) {}

  Result<UniqueFd> LockDirectory() const { return dir_.lock(); }
  std::string path() const { return dir_.path_of(name_); }

  // REQUIRES of all that follows: the directory is locked.

  // A ledger that nobody uses any more is replaced. Errors: those of Ledger::Open().
  Result<std::unique_ptr<LedgerStore>> OpenOrCreate() const;
  bool is_current(const LedgerStore& store) const { return dir_.leads_to(name_, store.fd()); }
  void Remove(const LedgerStore& store) const {
    if (is_current(store)) Unlink();
  }

  // Drops the rows of the dead. Errors: as OpenOrCreate(), and kSystem (ENOENT: there is none).
  Result<void> DropDead() const;
  // Errors: as DropDead(), and kBusy when somebody uses it.
  Result<void> RemoveUnused() const;

 private:
  // Whom an end of the ledger would concern.
  enum class Use : uint8_t {
    kNobody,  // we have it alone, locked against others
    kOwners,  // likewise; but processes live that have rows without knowing of it
    kOpen,    // others have it open, as we do now
  };
  struct Existing {
    UniqueFd fd;
    Use use;
  };
  // Nothing is changed. Errors: those of OpenOrCreate(), kSystem (ENOENT).
  Result<Existing> OpenExisting() const;
  // Without rows of the dead.
  Result<std::unique_ptr<LedgerStore>> TakePart(Existing existing) const;
  Result<bool> HasLivingOwner(int fd) const;
  Result<std::unique_ptr<LedgerStore>> Create() const;
  Result<UniqueFd> CreateHidden(const std::string& name) const;
  void Unlink() const;

  RuntimeDir dir_;
  std::string vm_uuid_;
  std::string name_;
  ProcessId self_;
};

}  // namespace mvgpu::domain
