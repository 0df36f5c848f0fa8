#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "apionly-domain/accounting/file_view.h"
#include "apionly-domain/accounting/ledger_memory.h"
#include "apionly-domain/accounting/process_info.h"
#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/memory/guest_file.h"

namespace mvgpu::domain {

// What happens to a ledger with its lock held: rows come and go, room is made for bits, and what a
// dead process left is put in order. Holding and releasing goes without it: row_holds.h.
//
// A process that dies inside an operation leaves the lock to the next one, which drops the rows of
// the dead. Rows of processes that died elsewhere are dropped when somebody opens, joins or leaves.
//
// Thread-safe, within and among processes. Not to be used in a child after fork(): open the ledger
// there.
class LedgerStore {
 public:
  // Which row, and proof that it is still the one that was added: another process may have taken
  // this one for dead.
  struct RowId {
    unsigned index = 0;
    uint64_t token = 0;
  };
  struct RowInfo {
    uint32_t kind = 0;
    std::string_view name;
    std::string_view pin_backend;
  };

  LedgerStore(std::unique_ptr<LedgerMemory> memory, ProcessId self)
      : memory_(std::move(memory)), self_(self) {}

  // Drops rows of dead processes; the number of rows that remain. Errors: kBusy, kCorrupt.
  Result<unsigned> reclaim();
  // Errors: kLimit (all rows taken), kBusy, kCorrupt.
  Result<RowId> add_row(const RowInfo& info);
  // Drops the row with all it holds; the number of rows that remain.
  unsigned remove_row(RowId id);
  // The row is that of another process from now on, which does not know of it. REQUIRES: nobody
  // holds or releases by it any more. Errors: kBusy, kRevoked (the row was dropped), kCorrupt.
  Result<void> give_row(RowId id, const ProcessId& owner);
  // Drops the rows that were given to this process; how many there were. Errors: kBusy, kCorrupt.
  Result<unsigned> drop_given_rows(const ProcessId& owner);

  // Makes room for the row holding these pages, so that it need not take the lock for that.
  // Errors: kLimit, kBusy (the lock was not to be had for 5 s), kRevoked (the row was dropped),
  // kCorrupt, kSystem.
  Result<FileView> make_room(RowId id, const FileIdentity& file, uint64_t file_pages,
                             PageRun pages);
  // The row's list of mappings, with room at this place. Errors: as make_room(). REQUIRES: place <
  // kMaxMappings.
  Result<LedgerSegment> make_mapping_room(RowId id, uint32_t place);
  // Where the bits are now. nullopt when the row or the file is not there any more.
  std::optional<FileView> look_up(RowId id, const FileIdentity& file);
  // For how many pages the row pays, by its bits and those of the others: takes the longer the more
  // it holds.
  uint64_t charged_pages(RowId id);

  // Without the lock, for the words that are atomic.
  ledger_format::RowRecord& row(unsigned index) const { return memory_->row(index); }
  bool owns(RowId id) const {
    return ledger_format::LoadWord(memory_->row(id.index).token) == id.token;
  }

  const std::string& path() const { return memory_->path(); }
  int fd() const { return memory_->fd(); }

 private:
  // Holds the lock while it lives.
  class Guard {
   public:
    explicit Guard(LedgerStore* store) : store_(store) {}
    Guard(Guard&& other) noexcept : store_(std::exchange(other.store_, nullptr)) {}
    Guard& operator=(Guard&&) = delete;
    ~Guard() {
      if (store_ != nullptr) store_->Unlock();
    }

   private:
    LedgerStore* store_;
  };

  Result<Guard> Lock();
  // For what cannot fail: waits until a stopped process goes on. False when the lock is beyond use.
  bool LockForRelease(std::optional<Guard>& guard);
  void Unlock();

  tl::unexpected<Error> Dropped(RowId id) const;
  void RepairLocked();
  void DropRowLocked(unsigned index);
  unsigned ReclaimLocked();
  std::optional<unsigned> FindFileLocked(const FileIdentity& file) const;
  Result<unsigned> FindOrAddFileLocked(const FileIdentity& file, uint64_t pages);
  Result<unsigned> FreeFileRecordLocked();
  bool FreeFileLocked(unsigned index);

  const std::unique_ptr<LedgerMemory> memory_;
  const ProcessId self_;
};

}  // namespace mvgpu::domain
