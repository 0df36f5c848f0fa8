#include "apionly-domain/accounting/ledger.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cstdlib>
#include <utility>

#include "apionly-domain/accounting/ledger_file.h"
#include "apionly-domain/accounting/ledger_store.h"
#include "apionly-domain/accounting/row_holds.h"
#include "apionly-domain/accounting/row_mappings.h"
#include "apionly-domain/accounting/runtime_dir.h"
#include "apionly-domain/base/check.h"
#include "apionly-domain/base/mutex.h"

namespace mvgpu::domain {

namespace {

class SharedLedger;

class SharedLedgerRow final : public LedgerRow {
 public:
  SharedLedgerRow(SharedLedger* ledger, LedgerStore* store, LedgerStore::RowId id)
      : ledger_(ledger), store_(store), id_(id), holds_(*store, id), mappings_(*store, id) {}
  ~SharedLedgerRow() override;

  Result<void> hold(const FileIdentity& file, uint64_t file_pages, PageRun pages) override {
    Result<void> outcome = holds_.hold(file, file_pages, pages);
    if (outcome) held_pages_ += pages.count;
    return outcome;
  }
  void release(const FileIdentity& file, PageRun pages) override {
    holds_.release(file, pages);
    held_pages_ -= pages.count;
  }

  void set_mapped_pages(uint64_t pages) override {
    Set(&ledger_format::RowRecord::mapped_pages, pages);
  }
  void set_pinned_pages(uint64_t pages) override {
    Set(&ledger_format::RowRecord::pinned_pages, pages);
  }
  void set_locked_pages(uint64_t pages) override {
    Set(&ledger_format::RowRecord::locked_pages, pages);
  }
  void set_locked_areas(uint64_t areas, uint64_t budget) override {
    Set(&ledger_format::RowRecord::locked_areas, areas);
    Set(&ledger_format::RowRecord::area_budget, budget);
  }
  void set_granule_pages(uint32_t pages) override {
    if (!store_->owns(id_)) return;
    ledger_format::StoreWord(store_->row(id_.index).granule_pages, pages);
  }
  void set_cache(const CacheFigures& figures) override {
    Set(&ledger_format::RowRecord::cached_pages, figures.cached_pages);
    Set(&ledger_format::RowRecord::idle_pages, figures.idle_pages);
    Set(&ledger_format::RowRecord::cache_hit_pages, figures.hit_pages);
    Set(&ledger_format::RowRecord::cache_miss_pages, figures.miss_pages);
    Set(&ledger_format::RowRecord::cache_unmapped_pages, figures.unmapped_pages);
    Set(&ledger_format::RowRecord::cache_revoked_pages, figures.revoked_pages);
    Set(&ledger_format::RowRecord::cache_evicted_pages, figures.evicted_pages);
    Set(&ledger_format::RowRecord::cache_map_calls, figures.map_calls);
    Set(&ledger_format::RowRecord::cache_mapper_calls, figures.mapper_calls);
    Set(&ledger_format::RowRecord::cache_revocations, figures.revocations);
    Set(&ledger_format::RowRecord::cache_moved_pages, figures.moved_pages);
  }

  void list_mapping(const LedgerMapping& mapping) override { mappings_.add(mapping); }
  void unlist_mapping(IovaRange part) override { mappings_.remove(part); }

  Counts counts() const override {
    if (!store_->owns(id_)) return {};
    const ledger_format::RowRecord& row = store_->row(id_.index);
    return {ledger_format::LoadWord(row.held_pages) - ledger_format::LoadWord(row.released_pages),
            store_->charged_pages(id_)};
  }

 private:
  void Set(uint64_t ledger_format::RowRecord::*figure, uint64_t value) {
    if (store_->owns(id_)) ledger_format::StoreWord(store_->row(id_.index).*figure, value);
  }

  SharedLedger* const ledger_;  // outlives its rows: contract of Ledger::join()
  LedgerStore* const store_;    // the ledger's; it is not replaced while there are rows
  const LedgerStore::RowId id_;
  RowHolds holds_;
  RowMappings mappings_;
  uint64_t held_pages_ = 0;  // what we did ourselves, whatever the file says
};

class SharedLedger final : public Ledger {
 public:
  SharedLedger(LedgerFile file, std::unique_ptr<LedgerStore> store)
      : file_(std::move(file)), path_(file_.path()), store_(std::move(store)) {}

  ~SharedLedger() override {
    MutexLock lock(mutex_);
    MVGPU_CHECK(own_rows_ == 0);
    const auto directory = file_.LockDirectory();
    const auto rows = store_->reclaim();
    if (directory && rows && *rows == 0) file_.Remove(*store_);
  }

  Result<std::unique_ptr<LedgerRow>> join(DomainKind kind, std::string_view name,
                                          std::string_view pin_backend) override {
    MutexLock lock(mutex_);
    MVGPU_ASSIGN_OR_RETURN(const UniqueFd directory, file_.LockDirectory());
    MVGPU_RETURN_IF_ERROR(FollowFile());
    MVGPU_ASSIGN_OR_RETURN(const LedgerStore::RowId id,
                           store_->add_row({static_cast<uint32_t>(kind), name, pin_backend}));
    ++own_rows_;
    return std::make_unique<SharedLedgerRow>(this, store_.get(), id);
  }

  Result<unsigned> enroll(const Enrolment& enrolment) override {
    MutexLock lock(mutex_);
    // Held to the end: so nobody else does the same for this process meanwhile.
    MVGPU_ASSIGN_OR_RETURN(const UniqueFd directory, file_.LockDirectory());
    MVGPU_RETURN_IF_ERROR(FollowFile());
    MVGPU_RETURN_IF_ERROR(CheckOwner(enrolment.owner));
    MVGPU_ASSIGN_OR_RETURN(const LedgerStore::RowId id,
                           store_->add_row({static_cast<uint32_t>(enrolment.kind), enrolment.name,
                                            enrolment.pin_backend}));
    // Ours until it is complete: were we killed, it would go like any other of ours.
    auto outcome = Fill(id, enrolment.holdings);
    if (outcome) {
      RowMappings list(*store_, id);
      for (const LedgerMapping& mapping : enrolment.mappings) list.add(mapping);
    }
    if (outcome) outcome = store_->give_row(id, enrolment.owner);
    if (outcome) return id.index;
    store_->remove_row(id);
    return tl::unexpected<Error>(std::move(outcome).error());
  }

  Result<void> withdraw(const ProcessId& owner) override {
    MutexLock lock(mutex_);
    MVGPU_ASSIGN_OR_RETURN(const UniqueFd directory, file_.LockDirectory());
    MVGPU_RETURN_IF_ERROR(FollowFile());
    MVGPU_ASSIGN_OR_RETURN(const unsigned dropped, store_->drop_given_rows(owner));
    if (dropped != 0) return {};
    return Fail(ErrorCode::kNotMapped,
                fmt::format("no row of {} was registered for process {}", path_, owner.pid));
  }

  void Leave(LedgerStore::RowId id) {
    MutexLock lock(mutex_);
    const auto directory = file_.LockDirectory();
    const unsigned rows = store_->remove_row(id);
    --own_rows_;
    // Without the directory's lock the file stays, without rows; who opens it next or closes it
    // last sees to it.
    if (rows == 0 && directory) file_.Remove(*store_);
  }

  const std::string& path() const override { return path_; }

 private:
  // The file may have gone with the last row of the VM. REQUIRES: the directory is locked.
  Result<void> FollowFile() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (file_.is_current(*store_)) return {};
    if (own_rows_ != 0) {
      return Fail(
          ErrorCode::kRevoked,
          fmt::format("somebody removed {} while {} rows of it are in use here", path_, own_rows_));
    }
    MVGPU_ASSIGN_OR_RETURN(store_, file_.OpenOrCreate());
    return {};
  }
  Result<void> CheckOwner(const ProcessId& owner) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (LivenessOf(owner) != Liveness::kAlive) {
      return Fail(ErrorCode::kNotMapped,
                  fmt::format("process {} is not alive, or of another pid namespace", owner.pid));
    }
    for (unsigned i = 0; i < ledger_format::kMaxRows; ++i) {
      const ledger_format::RowRecord& row = store_->row(i);
      if (!ledger_format::IsRegistered(row) || OwnerOf(row) != owner) continue;
      return Fail(ErrorCode::kOverlap,
                  fmt::format("process {} is registered already, as row {} of {}; undo that first",
                              owner.pid, i, path_));
    }
    return {};
  }
  Result<void> Fill(LedgerStore::RowId id, std::span<const Enrolment::Holding> holdings)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    RowHolds holds(*store_, id);
    uint64_t pages = 0;
    for (const Enrolment::Holding& holding : holdings) {
      MVGPU_RETURN_IF_ERROR(holds.hold(holding.file, holding.file_pages, holding.pages));
      pages += holding.pages.count;
    }
    ledger_format::StoreWord(store_->row(id.index).mapped_pages, pages);
    ledger_format::StoreWord(store_->row(id.index).pinned_pages, pages);
    ledger_format::StoreWord(store_->row(id.index).locked_pages, pages);
    return {};
  }

  const LedgerFile file_;
  const std::string path_;
  Mutex mutex_;  // before the directory's lock, which is before the ledger's
  std::unique_ptr<LedgerStore> store_ ABSL_GUARDED_BY(mutex_);
  unsigned own_rows_ ABSL_GUARDED_BY(mutex_) = 0;
};

SharedLedgerRow::~SharedLedgerRow() {
  MVGPU_CHECK(held_pages_ == 0);
  ledger_->Leave(id_);
}

}  // namespace

Result<std::string> Ledger::DefaultRuntimeDir() {
  if (::geteuid() == 0) return std::string("/run/mvgpu");
  const char* base = std::getenv("XDG_RUNTIME_DIR");
  if (base == nullptr || base[0] != '/') {
    return Fail(
        ErrorCode::kInvalid,
        "XDG_RUNTIME_DIR is not set to an absolute path; set it or name a runtime directory");
  }
  return std::string(base) + "/mvgpu";
}

Result<std::unique_ptr<Ledger>> Ledger::Open(Options options) {
  auto uuid = NormalizedUuid(options.vm_uuid);
  if (!uuid) {
    return Fail(
        ErrorCode::kInvalid,
        fmt::format("'{}' is not a vm uuid of 8-4-4-4-12 hexadecimal digits", options.vm_uuid));
  }
  if (options.runtime_dir.empty()) {
    MVGPU_ASSIGN_OR_RETURN(options.runtime_dir, DefaultRuntimeDir());
  }
  MVGPU_ASSIGN_OR_RETURN(const ProcessId self, CurrentProcess());
  MVGPU_ASSIGN_OR_RETURN(RuntimeDir dir, RuntimeDir::OpenOrCreate(options.runtime_dir));
  LedgerFile file(std::move(dir), std::move(*uuid), self);
  std::unique_ptr<LedgerStore> store;
  {
    MVGPU_ASSIGN_OR_RETURN(const UniqueFd directory, file.LockDirectory());
    MVGPU_ASSIGN_OR_RETURN(store, file.OpenOrCreate());
  }
  return std::make_unique<SharedLedger>(std::move(file), std::move(store));
}

}  // namespace mvgpu::domain
