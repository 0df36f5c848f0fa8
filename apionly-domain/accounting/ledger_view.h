#pragma once

// A look at a VM's ledger without taking part in it: read-only, no lock, no mapping, without the
// help of any process that wrote it, also after a crash.
//
// The file is not trusted. It is copied with pread(), so it may shrink meanwhile; every offset and
// size is checked against the file before it is used, and the work is bounded by the file's size.
//
// While others change the ledger a copy may show numbers in motion. The read is repeated a few
// times to get a quiet one; if there is none, `in_motion` is set and figures may be off by the
// pages of the changes that were under way. That stays checkable: least_ and most_unique_pages say
// within which bounds a row's bits must be, whatever its owner did during the read.

#include <cstdint>
#include <string>
#include <vector>

#include "apionly-domain/accounting/ledger.h"
#include "apionly-domain/accounting/process_info.h"
#include "apionly-domain/accounting/runtime_dir.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/memory/guest_file.h"

namespace mvgpu::domain {

struct LedgerSnapshot {
  struct Row {
    unsigned index = 0;
    std::string name;  // printable ASCII; anything else was replaced by '?'
    std::string pin_backend;
    uint32_t kind = 0;  // a DomainKind, or something unknown
    ProcessId owner;
    Liveness liveness = Liveness::kUnknown;
    bool is_registered = false;  // its owner does not know of it
    uint32_t granule_pages = 0;
    uint32_t unlisted_mappings = 0;
    // The domain's own figures.
    uint64_t mapped_pages = 0;
    uint64_t pinned_pages = 0;
    uint64_t locked_pages = 0;
    uint64_t locked_areas = 0;
    uint64_t area_budget = 0;
    CacheFigures cache;
    // What the bits say.
    uint64_t unique_pages = 0;
    uint64_t charged_pages = 0;
    // What the owner's counters say of unique_pages. Everything is possible for an owner that died
    // or was stopped in the midst of a change.
    uint64_t least_unique_pages = 0;
    uint64_t most_unique_pages = UINT64_MAX;
  };
  struct File {
    FileIdentity identity;
    uint64_t pages = 0;
    uint64_t unique_pages = 0;        // held by any row
    uint64_t pages_beyond_end = 0;    // held, but the file is shorter
    uint64_t pages_of_free_rows = 0;  // held by rows that nobody has
  };

  std::string path;
  std::string vm_uuid;
  bool in_motion = false;
  uint64_t repairs = 0;
  std::vector<Row> rows;
  std::vector<File> files;    // of which a row held something since it joined
  uint64_t unique_pages = 0;  // of the VM: the union over rows

  // Of all rows; equal to unique_pages when the ledger is in order.
  uint64_t charged_pages() const;
};

// "api-only", "assigned", "nested", or "kind-N".
std::string DomainKindName(uint32_t kind);

// Errors: kCorrupt (what was found and expected), kPermission, kSystem (errno ENOENT: the VM has
// none).
Result<LedgerSnapshot> ReadLedger(const RuntimeDir& dir, const std::string& vm_uuid);
// The same for a file that is open. `path` is for messages.
Result<LedgerSnapshot> ReadLedgerFile(int fd, const std::string& path, const std::string& vm_uuid);
// As if this row had left: what the others would be charged then.
Result<LedgerSnapshot> ReadLedgerWithout(int fd, const std::string& path,
                                         const std::string& vm_uuid, unsigned row);
// Whether the file is a ledger that may be taken part in. Errors: as ReadLedgerFile().
Result<void> CheckLedgerFile(int fd, const std::string& path, const std::string& vm_uuid);

// One line for each invariant that the ledger breaks; empty when it is in order. A row of a dead
// process is no such thing: it is dropped when the next domain joins. Of a ledger in motion only
// the bounds of rows are checked.
std::vector<std::string> ProblemsOf(const LedgerSnapshot& snapshot);

}  // namespace mvgpu::domain
