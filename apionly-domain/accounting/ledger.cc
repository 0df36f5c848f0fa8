#include "apionly-domain/accounting/ledger.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <utility>

#include "apionly-domain/accounting/ledger_store.h"
#include "apionly-domain/accounting/ledger_view.h"
#include "apionly-domain/accounting/row_holds.h"
#include "apionly-domain/accounting/runtime_dir.h"
#include "apionly-domain/base/check.h"
#include "apionly-domain/base/mutex.h"

namespace mvgpu::domain {

namespace {

// Files come and go only with the directory locked, so nobody is left with a file that was removed.
class LedgerFile {
 public:
  LedgerFile(RuntimeDir dir, std::string vm_uuid, ProcessId self)
      : dir_(std::move(dir)),
        vm_uuid_(std::move(vm_uuid)),
        name_(LedgerFileName(vm_uuid_)),
        self_(self) {}

  // REQUIRES of all three: the directory is locked.
  Result<std::unique_ptr<LedgerStore>> OpenOrCreate() const;
  bool is_current(const LedgerStore& store) const { return dir_.leads_to(name_, store.fd()); }
  void Remove(const LedgerStore& store) const {
    if (is_current(store)) ::unlinkat(dir_.fd(), name_.c_str(), 0);
  }

  Result<UniqueFd> LockDirectory() const { return dir_.lock(); }
  std::string path() const { return dir_.path_of(name_); }

 private:
  Result<std::unique_ptr<LedgerStore>> Create() const;
  Result<UniqueFd> CreateHidden(const std::string& name) const;

  RuntimeDir dir_;
  std::string vm_uuid_;
  std::string name_;
  ProcessId self_;
};

Result<std::unique_ptr<LedgerStore>> LedgerFile::OpenOrCreate() const {
  auto file = dir_.open_file(name_, O_RDWR);
  if (!file && file.error().sys_errno() == ENOENT) return Create();
  if (!file) return tl::unexpected<Error>(std::move(file).error());
  struct stat st = {};
  if (::fstat(file->get(), &st) != 0) return FailSystem(errno, "cannot stat " + path());
  if ((st.st_mode & 0077) != 0) {
    return Fail(
        ErrorCode::kPermission,
        fmt::format("{} has mode {:04o}: others may open it; if it is yours, chmod it to 0600",
                    path(), st.st_mode & 07777));
  }
  // Nothing is changed before everything in it was found to be in order.
  MVGPU_RETURN_IF_ERROR(CheckLedgerFile(file->get(), path(), vm_uuid_));
  if (::flock(file->get(), LOCK_EX | LOCK_NB) == 0) {
    // Nobody has it open: what is in there, its lock included, was left by processes that are dead.
    ::unlinkat(dir_.fd(), name_.c_str(), 0);
    return Create();
  }
  if (::flock(file->get(), LOCK_SH | LOCK_NB) != 0) {
    return Fail(ErrorCode::kBusy, fmt::format("{} is locked by a program of another kind", path()));
  }
  MVGPU_ASSIGN_OR_RETURN(auto memory, LedgerMemory::Map(std::move(*file), path()));
  auto store = std::make_unique<LedgerStore>(std::move(memory), self_);
  MVGPU_RETURN_IF_ERROR(store->reclaim());
  return store;
}

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

class SharedLedger;

class SharedLedgerRow final : public LedgerRow {
 public:
  SharedLedgerRow(SharedLedger* ledger, LedgerStore* store, LedgerStore::RowId id)
      : ledger_(ledger), store_(store), id_(id), holds_(*store, id) {}
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
  }

  Counts counts() const override {
    if (!store_->owns(id_)) return {};
    const ledger_format::RowRecord& row = store_->row(id_.index);
    return {ledger_format::LoadWord(row.held_pages) - ledger_format::LoadWord(row.released_pages),
            store_->charged_pages(id_)};
  }

 private:
  void Set(uint64_t ledger_format::RowRecord::*figure, uint64_t pages) {
    if (store_->owns(id_)) ledger_format::StoreWord(store_->row(id_.index).*figure, pages);
  }

  SharedLedger* const ledger_;  // outlives its rows: contract of Ledger::join()
  LedgerStore* const store_;    // the ledger's; it is not replaced while there are rows
  const LedgerStore::RowId id_;
  RowHolds holds_;
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
    if (!file_.is_current(*store_)) {
      if (own_rows_ != 0) {
        return Fail(ErrorCode::kRevoked,
                    fmt::format("somebody removed {} while {} rows of it are in use here", path_,
                                own_rows_));
      }
      MVGPU_ASSIGN_OR_RETURN(store_, file_.OpenOrCreate());  // the last row of the VM had left
    }
    MVGPU_ASSIGN_OR_RETURN(const LedgerStore::RowId id,
                           store_->add_row({static_cast<uint32_t>(kind), name, pin_backend}));
    ++own_rows_;
    return std::make_unique<SharedLedgerRow>(this, store_.get(), id);
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
