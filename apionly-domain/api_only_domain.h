#pragma once

// The api-only domain: a VFIO domain without IOMMU hardware behind it (the idea of the "api-only"
// iommu domain on qemu-devel, May 2016). Where a hardware domain programs translations into a
// device, this one stores them for later requests:
//
//   translate   IOVA -> host address, checked against holes, permissions and the end of mappings
//   read/write  a CPU copy without a pin, for rings, descriptors and commands (VFIO's vfio_dma_rw)
//   pin         a hold on pages that a device will touch later (VFIO's vfio_pin_pages), through a
//               PinContext: the pages are locked by the pin back end and charged in the VM's ledger
//               when the first holder comes, and let go when the last one leaves
//   dirty log   which pages were written, by copies and through pins, since the VMM last asked
//
// Invariants
//   - A page is pinned by the back end iff at least one context holds it and no mapping of an
//     assigned device does (pin/device_pins.h); identity is (file, page), so a page seen at two
//     IOVAs is pinned and charged once.
//   - No pin and no copy reaches memory whose mapping has gone: on_unmap() marks the mappings as
//     going, so that nothing new starts, waits for copies, makes every owner let go, and refuses
//     the unmap, naming the holders, when one does not in time.
//   - What a context holds changes only under the pin lock. So hits (counts that go up and down
//     above zero) need nothing but the context's own lock, and misses see all contexts stand still.
//
// Where to read next: translation/page_directory.h (IOVA -> host), pin/pin_context.h (hits),
// miss_path.cc (first pins and last releases), lock_hand_over.cc (pages that a device's mapping
// holds), unmap.cc (revocation), pin/ (how pages are held), accounting/ledger.h (who pays).

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <absl/container/btree_map.h>
#include <absl/container/flat_hash_map.h>
#include <absl/container/inlined_vector.h>

#include "apionly-domain/accounting/ledger.h"
#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/base/mutex.h"
#include "apionly-domain/dirty_log.h"
#include "apionly-domain/domain.h"
#include "apionly-domain/pin/device_pins.h"
#include "apionly-domain/pin/mapped_files.h"
#include "apionly-domain/pin/pin_backend.h"
#include "apionly-domain/pin/pin_context.h"
#include "apionly-domain/pin/pinned_range.h"
#include "apionly-domain/translation/access_slots.h"
#include "apionly-domain/translation/page_directory.h"

namespace mvgpu::domain {

// Sees the guest bytes that leave guest memory, in the order in which they are used. For recording.
class AccessObserver {
 public:
  virtual ~AccessObserver() = default;
  virtual void on_guest_read(Iova iova, std::span<const std::byte> bytes) = 0;
};

// Reaches guest memory that has no file, by asking the VMM for it (vfio-user's DMA_READ and
// DMA_WRITE). Slow: a round trip for each call, unless an implementation answers kPending instead
// of waiting and has the bytes when it is asked again.
class RemoteMemory {
 public:
  virtual ~RemoteMemory() = default;
  // Errors: kNotReachable (the VMM refuses), kPending, kLimit, kProtocol (the VMM cannot be asked
  // any more); something undefined was copied then.
  virtual Result<void> read(Iova iova, std::span<std::byte> destination) = 0;
  virtual Result<void> write(Iova iova, std::span<const std::byte> source) = 0;
};

// Thread-safe. Lock order: the container's change lock, an owner's lock or the one of DevicePins,
// then the pin lock, then a context's lock.
class ApiOnlyDomain final : public Domain, private DevicePins::Sharer {
 public:
  struct Options {
    std::string name = "api-only";
    uint64_t pin_limit_pages = UINT64_MAX;  // unique pages that may be pinned at a time
    // How long holders have to let go of memory that the VMM unmaps. The VMM stands still so long.
    std::chrono::milliseconds unmap_deadline{50};
    // Outlives the domain; called from whatever thread copies. Null: memory without a file cannot
    // be reached.
    RemoteMemory* remote = nullptr;
    // Outlives the domain. What it has is not locked by the pin back end too. Null: every page that
    // is pinned is.
    DevicePins* device_pins = nullptr;
  };
  struct Counters {
    uint64_t mapped_pages = 0;        // with a file behind
    uint64_t pinned_pages = 0;        // sum over pins
    uint64_t unique_pages = 0;        // distinct backing pages among them
    uint64_t peak_unique_pages = 0;   // the most of them at a time
    uint64_t charged_pages = 0;       // of the unique ones, charged to this domain
    uint64_t locked_pages = 0;        // held by the pin back end, granules included
    uint64_t pin_calls = 0;           // successful ones since creation, see PinContext
    uint64_t pages_pinned = 0;        // page holds taken since creation
    uint64_t pages_locked_first = 0;  // pages locked because nobody held them before
    uint64_t revocations = 0;         // owners told to let go
  };
  // The ledger and the observer (may be null) must outlive the domain. Errors: those of
  // Ledger::join().
  static Result<std::unique_ptr<ApiOnlyDomain>> Create(Options options,
                                                       std::unique_ptr<PinBackend> backend,
                                                       Ledger* ledger, AccessObserver* observer);
  // REQUIRES: detached from its container, all contexts closed.
  ~ApiOnlyDomain() override;

  // A way to pin for this owner. `owner` must outlive the context and every unmap under way, the
  // context must not outlive the domain.
  std::unique_ptr<PinContext> open_context(PinOwner* owner);

  // Whether a pin would find every page of the range mapped, reachable and allowed. Errors as
  // PinContext::pin().
  Result<void> check(IovaRange range, Access access) const;
  // The same for a copy, which also reaches memory without a file if Options::remote does. Errors
  // as read().
  Result<void> check_copy(IovaRange range, Access access) const;

  // A section in which translations are looked up. What it finds stays true until its end: unmaps
  // wait for that, so it is for a batch of lookups, not for keeping.
  class Translator {
   public:
    explicit Translator(const ApiOnlyDomain& domain)
        : directory_(domain.directory_), section_(domain.slots_) {}
    // The host address of an IOVA; null when it is not mapped, not reachable, not allowed, or about
    // to be unmapped. Not to be dereferenced: see GuestFile.
    std::byte* translate(Iova iova, Access access) const {
      const PageDirectory::Found found = directory_.find(iova);
      const bool usable = PageDirectory::IsUsable(found.flags, static_cast<uint64_t>(access));
      return usable ? found.host : nullptr;
    }
    // What is mapped at an IOVA, for who has a pin there: also while it is about to be unmapped.
    struct Place {
      std::byte* host;
      Access access;  // of the mapping
      uint64_t left;  // bytes for which both go on like this, at least
    };
    // REQUIRES: a pin holds the page.
    Place place(Iova iova) const {
      const PageDirectory::Found found = directory_.find(iova);
      constexpr uint64_t kRights = PageDirectory::kRead | PageDirectory::kWrite;
      return {found.host, static_cast<Access>(found.flags & kRights), found.left};
    }
    // For a translation that is kept outside: it was true as long as its generation is the one that
    // the address has now. Read the generation first, translate then.
    uint64_t generation(Iova iova) const { return directory_.generation(iova); }

   private:
    const PageDirectory& directory_;
    AccessSlots::Section section_;
  };

  // CPU copies without a pin. Errors: kNotMapped, kPermission, kNotReachable, kBusy (about to be
  // unmapped), kTruncated, kInvalid (wraps), those of RemoteMemory. Nothing is copied unless the
  // whole range is mapped and allows it; on a later error something undefined was copied.
  Result<void> read(Iova iova, std::span<std::byte> destination) const;
  Result<void> write(Iova iova, std::span<const std::byte> source);
  // From guest memory to guest memory. Also kInvalid: the ranges of IOVAs overlap.
  Result<void> copy(Iova to, Iova from, uint64_t size);
  // A copy out of pages that are pinned; no translation is needed.
  // REQUIRES: the run is part of a live PinnedRange and contains [iova, iova + size).
  Result<void> read_pinned(const PinnedRun& run, Iova iova, std::span<std::byte> destination) const;

  // A word in guest memory that both sides watch (ring indices): stored after everything written
  // before. It is an ordinary write, preceded by a release fence.
  Result<void> publish(Iova iova, std::span<const std::byte> source);

  // Words that the guest changes while we look, such as page table entries: each is read in one
  // access. Errors: as read(). REQUIRES: `iova` is aligned to 8, and the words lie in one page.
  Result<void> load_words(Iova iova, std::span<uint64_t> words) const;
  // Stores `desired` if the word is `expected`; returns what it was. Errors: as write(); always
  // kNotReachable without a file. REQUIRES: `iova` is aligned to 8.
  Result<uint64_t> compare_exchange(Iova iova, uint64_t expected, uint64_t desired);

  // The pages behind a run, up to the end of the first one's file: a run of huge pages may go on in
  // another file. REQUIRES: the run is part of a live PinnedRange.
  FilePages backing_of(const PinnedRun& run) const;

  // Dirty tracking. From start on, writes and pins for write mark pages by IOVA; mappings that are
  // added later join by themselves, and marks outlive their mapping until they are read.
  void start_dirty_log();
  void stop_dirty_log();
  // See DirtyLog::read(). Pages that are pinned for write are dirty in every round. Errors:
  // kInvalid (also while the log is off).
  Result<void> read_dirty(IovaRange range, uint64_t bit_size, DirtyLog::Read read,
                          std::span<uint64_t> bitmap);

  // Who holds pages in a range: what a refused unmap names.
  struct Holder {
    std::string owner;
    uint64_t pages = 0;  // distinct IOVA pages
    Iova first;
  };
  std::vector<Holder> holders(IovaRange range) const;

  Counters counters() const;
  // For the reader of the accounts: what the cache of device addresses in front of this domain says
  // of itself. Only a domain with a ledger keeps it.
  void show_cache(const CacheFigures& figures) const {
    if (ledger_row_ != nullptr) ledger_row_->set_cache(figures);
  }
  // Likewise, how much is locked, where that changes without a pin or a release: with a back end
  // whose locks are a device's mappings (assigned/mapping_pin_backend.h).
  void show_locked() const;

  std::string_view name() const override { return options_.name; }
  Result<void> on_map(const Mapping& mapping) override;
  void on_map_done(const Mapping& mapping, bool mapped) override;
  Result<void> on_unmap(const Unmapping& unmapping) override;
  void on_unmap_done(const Unmapping& unmapping, bool unmapped) override;

 private:
  friend class PinContext;  // hits read the directory; misses come here

  using Deadline = std::chrono::steady_clock::time_point;
  // A contiguous piece of a CPU copy. host is null where the VMM has to be asked.
  struct Piece {
    IovaRange iova;
    std::byte* host;
    // REQUIRES: iova contains [start, start + size).
    Piece slice(Iova start, uint64_t size) const {
      return {IovaRange::FromFirstAndLast(start, start + (size - 1)),
              host == nullptr ? nullptr : host + (start - iova.start())};
    }
  };
  using Pieces = absl::InlinedVector<Piece, 2>;

  ApiOnlyDomain(Options options, std::unique_ptr<PinBackend> backend, AccessObserver* observer);

  // miss_path.cc: what changes which pages are held.
  // All of `pages`, or nothing; appends to *runs. REQUIRES: they are apart.
  Result<void> PinMiss(PinContext* context, std::span<const PageRun> pages, Access access,
                       PinCounts::Form form, PinnedRuns* runs);
  void ReleaseMiss(PinContext* context, std::span<const PageRun> runs, bool for_write,
                   PinCounts::Form form);
  void CloseContext(PinContext* context);
  // Takes out of *runs what is held: by these counts, or by the contexts but `except`.
  static void SubtractHeld(const PinCounts& counts, std::vector<PageRun>* runs,
                           std::vector<PageRun>* scratch);
  void SubtractHeldLocked(std::vector<PageRun>* runs, const PinContext* except)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(pin_mutex_);
  // The pages behind IOVA pages that no context holds, without those that one holds at another IOVA
  // that shows them; each once. Valid until the next call.
  std::span<const FilePages> FilePagesLocked(std::span<const PageRun> runs)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(pin_mutex_);
  static void AppendPages(const FilePages& pages, std::vector<FilePages>* parts);
  // Appends those of the pages that no context holds at any of the IOVAs that show them.
  void AppendUnaliasedLocked(const FilePages& pages, std::vector<FilePages>* parts)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(pin_mutex_);
  // Pins and charges pages that nobody held before: all of them, or none and an error.
  Result<void> HoldLocked(std::span<const FilePages> fresh)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(pin_mutex_);
  Result<void> HoldOneLocked(const FilePages& fresh) ABSL_EXCLUSIVE_LOCKS_REQUIRED(pin_mutex_);
  // Unpins the pages again when they cannot be charged. REQUIRES: there is a ledger.
  Result<void> ChargeLocked(const FilePages& fresh) ABSL_EXCLUSIVE_LOCKS_REQUIRED(pin_mutex_);
  tl::unexpected<Error> PinLimitErrorLocked(uint64_t wanted) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(pin_mutex_);
  void LetGoLocked(const FilePages& pages) ABSL_EXCLUSIVE_LOCKS_REQUIRED(pin_mutex_);
  // To and from the pin back end, but for what a device's mapping holds.
  Result<void> LockLocked(const FilePages& pages) ABSL_EXCLUSIVE_LOCKS_REQUIRED(pin_mutex_);
  void UnlockLocked(const FilePages& pages) ABSL_EXCLUSIVE_LOCKS_REQUIRED(pin_mutex_);
  // To the ledger. REQUIRES: there is one.
  void PublishCountsLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(pin_mutex_);
  uint64_t PinnedPagesLocked() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(pin_mutex_);

  // lock_hand_over.cc
  void on_device_holds(const FileIdentity& file, PageRun pages) override;
  Result<void> on_device_leaves(const FileIdentity& file, PageRun pages) override;
  Result<void> LockRestLocked(const FilePages& pages) ABSL_EXCLUSIVE_LOCKS_REQUIRED(pin_mutex_);
  std::vector<PageRun> NotDeviceHeldLocked(const FilePages& pages) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(pin_mutex_);
  // Those of the pages that some context holds.
  std::vector<PageRun> PinnedRunsLocked(const FilePages& pages) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(pin_mutex_);
  // All of them, or none and an error.
  Result<void> LockRunsLocked(const GuestFile& file, std::span<const PageRun> runs)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(pin_mutex_);

  // word_access.cc
  // False when something is unusual; nothing is told to the observer.
  bool TryLoadWords(Iova iova, std::span<uint64_t> words) const;
  [[gnu::noinline]] Result<void> LoadWordsSlowly(Iova iova, std::span<uint64_t> words) const;

  // unmap.cc
  std::vector<PinContext*> HoldingContextsLocked(const Unmapping& unmapping) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(pin_mutex_);
  bool WaitForReleases(const Unmapping& unmapping, Deadline deadline);
  tl::unexpected<Error> HeldError(const Unmapping& unmapping) const;
  void RemoveFileless(IovaRange range);
  void FreeRetiredTables();

  // cpu_access.cc
  Result<IovaRange> CopyRange(Iova iova, uint64_t size) const;
  Result<Pieces> PiecesOf(IovaRange range, Access access) const;
  Result<void> ReadPiece(const Piece& piece, std::span<std::byte> to) const;
  Result<void> WritePiece(const Piece& piece, std::span<const std::byte> from);
  Result<void> CopyPiece(const Piece& from, const Piece& to);  // REQUIRES: of the same size
  void MarkWritten(IovaRange range);
  std::optional<Mapping> FilelessAt(Iova iova) const;
  // Why a walk over `range` stopped.
  Error StopError(IovaRange range, PageDirectory::Stop stop, Access access) const;
  Error TruncatedError(Iova iova, uint64_t size) const;

  const Options options_;
  AccessObserver* const observer_;  // outlives this, see Create()

  const std::string backend_name_;

  PageDirectory directory_;
  mutable AccessSlots slots_;
  DirtyLog dirty_;

  mutable Mutex fileless_mutex_;                                                  // innermost
  absl::btree_map<uint64_t, Mapping> fileless_ ABSL_GUARDED_BY(fileless_mutex_);  // by first IOVA

  mutable ExclusiveMutex pin_mutex_;
  ConditionVariable released_;  // a context let go of pages while an unmap waits
  const std::unique_ptr<PinBackend> backend_ ABSL_PT_GUARDED_BY(pin_mutex_);
  std::unique_ptr<LedgerRow> ledger_row_;  // set once by Create(); locks itself
  std::vector<PinContext*> contexts_ ABSL_GUARDED_BY(pin_mutex_);
  MappedFiles files_ ABSL_GUARDED_BY(pin_mutex_);
  // Pages that the back end does not lock, whoever holds them here: what Options::device_pins has
  // told. Without files of which there is none.
  absl::flat_hash_map<FileIdentity, RunCounter> device_held_ ABSL_GUARDED_BY(pin_mutex_);
  // What a miss works with; kept, so that misses allocate nothing.
  struct {
    std::vector<PageRun> unheld;
    std::vector<PageRun> rest;
    std::vector<PageRun> written;
    std::vector<FilePages> parts;
  } scratch_ ABSL_GUARDED_BY(pin_mutex_);
  bool unmap_waits_ ABSL_GUARDED_BY(pin_mutex_) = false;
  uint32_t granule_pages_ ABSL_GUARDED_BY(pin_mutex_) = 1;  // the largest, as the ledger shows it
  // Without what the contexts and the back end count; of closed contexts, what they counted.
  Counters counters_ ABSL_GUARDED_BY(pin_mutex_);
};

}  // namespace mvgpu::domain
