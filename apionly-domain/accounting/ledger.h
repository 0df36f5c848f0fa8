#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "apionly-domain/access.h"
#include "apionly-domain/accounting/process_info.h"
#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/memory/guest_file.h"

namespace mvgpu::domain {

enum class DomainKind : uint32_t { kApiOnly = 1, kAssignedDevice = 2, kNested = 3 };

// What a cache of device addresses in front of a domain has, and did since it was made.
struct CacheFigures {
  uint64_t cached_pages = 0;
  uint64_t idle_pages = 0;  // of these, used by nobody
  uint64_t hit_pages = 0;
  uint64_t miss_pages = 0;
  uint64_t unmapped_pages = 0;
  uint64_t revoked_pages = 0;  // of these, taken away by the VMM, or moved
  uint64_t evicted_pages = 0;  // and those that went for others
  uint64_t map_calls = 0;      // ranges and batches that were asked for, and got
  uint64_t mapper_calls = 0;   // to map
  uint64_t revocations = 0;    // users told that pages were taken away
  uint64_t moved_pages = 0;    // of those revoked, because the kernel had moved them

  bool operator==(const CacheFigures&) const = default;
};

// Where a domain sees pages of a file, for those who have an address and ask about it.
struct LedgerMapping {
  IovaRange iova;
  Access access;
  FileIdentity file;
  uint64_t file_offset = 0;  // bytes; of the first IOVA

  // The part of this mapping in `part`. REQUIRES: iova.contains(part).
  LedgerMapping slice(IovaRange part) const {
    return {part, access, file, file_offset + (part.start() - iova.start())};
  }
};

// One domain's row in the ledger of its VM (ledger_format.h). The row says which backing pages the
// domain holds and which of those it pays for. Over all rows of the VM every held page is paid for
// exactly once.
//
// One thread at a time may hold and release; whatever else may be called by any thread meanwhile.
// The row must be empty when it is destroyed (checked); it leaves the ledger then.
class LedgerRow {
 public:
  virtual ~LedgerRow() = default;

  // The domain now holds `pages` of the file (of `file_pages` pages in all), none of which it held
  // before. Pages that no other row holds are charged to this one; for the others whoever pays goes
  // on paying. Takes no lock but for the first pages in each 128 MiB of a file, and the first after
  // another domain came or went. Nothing is held on an error:
  // kInvalid (beyond the file), kLimit (no room: too many files, file system full), kBusy (a
  // stopped process kept the ledger locked for 5 s), kRevoked (another process took this one for
  // dead and dropped the row), kCorrupt, kSystem.
  virtual Result<void> hold(const FileIdentity& file, uint64_t file_pages, PageRun pages) = 0;
  // REQUIRES: the domain holds all of `pages`. Where it pays for one that another row holds too,
  // the same store that ends its share makes that row pay.
  virtual void release(const FileIdentity& file, PageRun pages) = 0;

  // Figures for the reader of the accounts, one store each; they do not influence charges.
  // In the container, with a file behind:
  virtual void set_mapped_pages(uint64_t pages) = 0;
  // Sum over all pins: one page pinned twice counts twice.
  virtual void set_pinned_pages(uint64_t pages) = 0;
  // What the kernel was asked to lock, granules included.
  virtual void set_locked_pages(uint64_t pages) = 0;
  // In how many separate stretches these are, and how many the pin back end allows itself; 0, 0
  // where that does not matter.
  virtual void set_locked_areas(uint64_t areas, uint64_t budget) = 0;
  // The largest granule in which the pin back end locks. 1 at first.
  virtual void set_granule_pages(uint32_t pages) = 0;
  virtual void set_cache(const CacheFigures& figures) = 0;

  // The domain's mappings, for the reader of the accounts. What does not fit (16384 of a row, or no
  // memory) is counted in the ledger and not listed. One call of these two at a time. `part`: a
  // mapping that was listed, or a part of one.
  virtual void list_mapping(const LedgerMapping& mapping) = 0;
  virtual void unlist_mapping(IovaRange part) = 0;

  struct Counts {
    uint64_t unique_pages = 0;   // held by this row, by backing page
    uint64_t charged_pages = 0;  // of these, paid for by this row
  };
  // Unique pages are a counter. Charged pages are counted out of the bits with the ledger's lock
  // held, which takes the longer the more is held: below 1 ms for 64 GiB. Pages that rows take or
  // let go of meanwhile may be in it or not, otherwise it is exact.
  virtual Counts counts() const = 0;
};

// The accounts of one VM, in a file in shared memory that every process with a domain of the VM
// opens and that `mvgpu-audit` reads: <runtime dir>/<vm uuid>.ledger. Format: ledger_format.h.
class Ledger {
 public:
  struct Options {
    std::string runtime_dir;  // empty: DefaultRuntimeDir()
    std::string vm_uuid;      // 8-4-4-4-12 hexadecimal digits
  };
  // /run/mvgpu for root, $XDG_RUNTIME_DIR/mvgpu otherwise; kInvalid, naming the variable, when
  // there is none.
  static Result<std::string> DefaultRuntimeDir();

  // Opens the VM's ledger or makes it (directory mode 0700, file mode 0600). Errors: kInvalid
  // (uuid), kPermission (the file belongs to another user), kCorrupt (another version, damaged),
  // kSystem.
  static Result<std::unique_ptr<Ledger>> Open(Options options);
  virtual ~Ledger() = default;

  // Adds a row for a domain of this process. Errors: kLimit when all rows are taken. The ledger
  // must outlive the row.
  virtual Result<std::unique_ptr<LedgerRow>> join(DomainKind kind, std::string_view name,
                                                  std::string_view pin_backend) = 0;

  // A domain of another process that does not know of the ledger: a device that the VMM assigned
  // to the VM by itself. Its row outlives this object and this process; it is dropped like any
  // other when its owner is dead.
  struct Enrolment {
    ProcessId owner;
    DomainKind kind = DomainKind::kAssignedDevice;
    std::string_view name;
    std::string_view pin_backend;
    struct Holding {
      FileIdentity file;
      uint64_t file_pages = 0;
      PageRun pages;
    };
    std::span<const Holding> holdings;  // no page twice
    // Where the devices see memory, as far as it is known; disjoint.
    std::span<const LedgerMapping> mappings = {};
  };
  // Adds the row with all it holds, or nothing; its number. Errors: kOverlap (the process has such
  // a row already), kNotMapped (it is not alive), those of join() and hold().
  virtual Result<unsigned> enroll(const Enrolment& enrolment) = 0;
  // Drops the rows that were added for this process. Errors: kNotMapped (there is none), kBusy,
  // kCorrupt, kSystem.
  virtual Result<void> withdraw(const ProcessId& owner) = 0;

  virtual const std::string& path() const = 0;
};

}  // namespace mvgpu::domain
