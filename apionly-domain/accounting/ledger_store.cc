#include "apionly-domain/accounting/ledger_store.h"

#include <fmt/format.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <optional>
#include <utility>

#include "apionly-domain/accounting/file_holds.h"

#if defined(__SANITIZE_THREAD__)
#define MVGPU_TSAN
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define MVGPU_TSAN
#endif
#endif
#ifdef MVGPU_TSAN
#include <sanitizer/tsan_interface.h>
#endif

namespace mvgpu::domain {

using ledger_format::FileRecord;
using ledger_format::LedgerHeader;
using ledger_format::RowRecord;

namespace {

constexpr time_t kLockTimeoutSeconds = 5;

// Everything that was stored before is in the file when `value` is: for readers without the lock,
// and for those who come after a crash.
template <typename T>
void Publish(T& field, T value) {
  std::atomic_ref<T>(field).store(value, std::memory_order_release);
}

template <size_t N>
void CopyName(char (&to)[N], std::string_view from) {
  const size_t length = std::min(from.size(), N - 1);
  std::memset(to, 0, N);
  std::memcpy(to, from.data(), length);
}

ProcessId OwnerOf(const RowRecord& row) { return {row.pid, row.start_time, row.pid_namespace}; }

pthread_mutex_t* LockOf(LedgerHeader& header) {
  return reinterpret_cast<pthread_mutex_t*>(header.lock);
}

// 0, EOWNERDEAD (locked too), ETIMEDOUT, or that the lock is beyond use.
int LockWithTimeout(pthread_mutex_t* mutex) {
  int error = pthread_mutex_trylock(mutex);
  if (error != EBUSY) return error;
  timespec deadline = {};
  clock_gettime(CLOCK_REALTIME, &deadline);
  deadline.tv_sec += kLockTimeoutSeconds;
  error = pthread_mutex_timedlock(mutex, &deadline);
#ifdef MVGPU_TSAN
  if (error == EOWNERDEAD) {  // the sanitizer does not know that this one is locked as well
    __tsan_mutex_pre_lock(mutex, 0);
    __tsan_mutex_post_lock(mutex, 0, 0);
  }
#endif
  return error;
}

}  // namespace

Result<LedgerStore::Guard> LedgerStore::Lock() {
  LedgerHeader& header = memory_->header();
  const int error = LockWithTimeout(LockOf(header));
  if (error == ETIMEDOUT) {
    return Fail(ErrorCode::kBusy,
                fmt::format("process {} has kept {} locked for {} s; is it stopped?",
                            std::atomic_ref<uint32_t>(header.lock_pid).load(), memory_->path(),
                            kLockTimeoutSeconds));
  }
  if (error != 0 && error != EOWNERDEAD) {
    return Fail(
        ErrorCode::kCorrupt,
        fmt::format("the lock of {} is beyond use (error {}); end the vm's domains and remove it",
                    memory_->path(), error));
  }
  Publish(header.sequence, header.sequence | 1);
  std::atomic_thread_fence(std::memory_order_release);  // odd before any change
  if (error == EOWNERDEAD) {
    RepairLocked();
    pthread_mutex_consistent(LockOf(header));
  }
  // The number last: a process that dies before that has changed nothing yet.
  header.lock_start_time = self_.start_time;
  header.lock_pid_namespace = self_.pid_namespace;
  Publish(header.lock_pid, self_.pid);
  return Guard(this);
}

void LedgerStore::Unlock() {
  LedgerHeader& header = memory_->header();
  Publish(header.sequence, (header.sequence | 1) + 1);
  Publish(header.lock_pid, uint32_t{0});
  pthread_mutex_unlock(LockOf(header));
}

bool LedgerStore::LockForRelease(std::optional<Guard>& guard) {
  while (true) {
    auto locked = Lock();
    if (locked) {
      guard.emplace(std::move(*locked));
      return true;
    }
    if (locked.error().code() != ErrorCode::kBusy) return false;
  }
}

void LedgerStore::RepairLocked() {
  LedgerHeader& header = memory_->header();
  // Its /proc entry outlives its lock for a moment: whoever died in here is dead, whatever it says
  // there.
  const ProcessId died{header.lock_pid, header.lock_start_time, header.lock_pid_namespace};
  for (unsigned i = 0; i < ledger_format::kMaxRows; ++i) {
    if (memory_->row(i).state == ledger_format::kRowActive && OwnerOf(memory_->row(i)) == died) {
      DropRowLocked(i);
    }
  }
  ReclaimLocked();
  for (unsigned i = 0; i < ledger_format::kMaxRows; ++i) {
    ledger_format::StoreCounter(memory_->row(i).unique_pages, 0);
    ledger_format::StoreCounter(memory_->row(i).charged_pages, 0);
  }
  for (unsigned i = 0; i < memory_->file_count(); ++i) {
    FileRecord& file = memory_->file(i);
    if (file.state != ledger_format::kFileUsed) continue;
    file.held_pages = 0;
    FileHolds holds(*memory_, i);
    holds.clear_stale_payers();
    holds.count();
  }
  ++header.repairs;
}

void LedgerStore::DropRowLocked(unsigned index) {
  for (unsigned i = 0; i < memory_->file_count(); ++i) {
    const FileRecord& file = memory_->file(i);
    if (file.state == ledger_format::kFileUsed && (file.holder_rows >> index & 1) != 0) {
      FileHolds(*memory_, i).drop(index);
    }
  }
  RowRecord& row = memory_->row(index);
  Publish(row.state, static_cast<uint32_t>(ledger_format::kRowFree));
}

unsigned LedgerStore::ReclaimLocked() {
  unsigned live = 0;
  for (unsigned i = 0; i < ledger_format::kMaxRows; ++i) {
    RowRecord& row = memory_->row(i);
    if (row.state != ledger_format::kRowActive) continue;
    if (LivenessOf(OwnerOf(row)) == Liveness::kDead) {
      DropRowLocked(i);
    } else {
      ++live;
    }
  }
  return live;
}

Result<unsigned> LedgerStore::reclaim() {
  MVGPU_ASSIGN_OR_RETURN(const Guard guard, Lock());
  return ReclaimLocked();
}

Result<LedgerStore::RowId> LedgerStore::add_row(const RowInfo& info) {
  MVGPU_ASSIGN_OR_RETURN(const Guard guard, Lock());
  ReclaimLocked();
  for (unsigned i = 0; i < ledger_format::kMaxRows; ++i) {
    RowRecord& row = memory_->row(i);
    if (row.state == ledger_format::kRowActive) continue;
    row = RowRecord{};
    row.kind = info.kind;
    row.pid = self_.pid;
    row.start_time = self_.start_time;
    row.pid_namespace = self_.pid_namespace;
    row.granule_pages = 1;
    row.token = memory_->header().next_token++;
    CopyName(row.name, info.name);
    CopyName(row.pin_backend, info.pin_backend);
    Publish(row.state, static_cast<uint32_t>(ledger_format::kRowActive));
    return RowId{i, row.token};
  }
  return Fail(ErrorCode::kLimit, fmt::format("all {} rows of {} are taken; domain {} cannot join",
                                             ledger_format::kMaxRows, memory_->path(), info.name));
}

unsigned LedgerStore::remove_row(RowId id) {
  std::optional<Guard> guard;
  if (!LockForRelease(guard)) return ledger_format::kMaxRows;  // not removed: say that rows remain
  if (owns(id)) DropRowLocked(id.index);
  return ReclaimLocked();
}

bool LedgerStore::owns(RowId id) const {
  const RowRecord& row = memory_->row(id.index);
  return std::atomic_ref<uint32_t>(const_cast<uint32_t&>(row.state)).load() ==
             ledger_format::kRowActive &&
         ledger_format::LoadCounter(row.token) == id.token;
}

std::optional<unsigned> LedgerStore::FindFileLocked(const FileIdentity& identity) const {
  for (unsigned i = 0; i < memory_->file_count(); ++i) {
    const FileRecord& file = memory_->file(i);
    if (file.state == ledger_format::kFileUsed && file.device == identity.device &&
        file.inode == identity.inode) {
      return i;
    }
  }
  return std::nullopt;
}

// A record that was never used, or one of a file of which nothing is held any more.
Result<unsigned> LedgerStore::FreeFileRecordLocked() {
  const unsigned count = memory_->file_count();
  if (count < ledger_format::kMaxFiles) {
    MVGPU_RETURN_IF_ERROR(memory_->allocate_file_record(count));
    memory_->file(count) = FileRecord{};
    Publish(memory_->header().file_count, count + 1);
    return count;
  }
  for (unsigned i = 0; i < count; ++i) {
    FileRecord& file = memory_->file(i);
    if (file.held_pages != 0) continue;
    for (unsigned row = 0; row < ledger_format::kMaxRows; ++row) {
      if ((file.holder_rows >> row & 1) != 0) FileHolds(*memory_, i).drop(row);
    }
    Publish(file.state, static_cast<uint32_t>(ledger_format::kFileFree));
    return i;
  }
  return Fail(ErrorCode::kLimit,
              fmt::format("{} accounts for {} files already and pages of all of them are held",
                          memory_->path(), count));
}

Result<unsigned> LedgerStore::FindOrAddFileLocked(const FileIdentity& identity, uint64_t pages) {
  if (const auto found = FindFileLocked(identity)) {
    FileRecord& file = memory_->file(*found);
    if (file.pages < pages) file.pages = pages;
    return *found;
  }
  MVGPU_ASSIGN_OR_RETURN(const unsigned index, FreeFileRecordLocked());
  FileRecord& file = memory_->file(index);
  file.device = identity.device;
  file.inode = identity.inode;
  file.pages = pages;
  Publish(file.state, static_cast<uint32_t>(ledger_format::kFileUsed));
  return index;
}

Result<void> LedgerStore::hold(RowId id, const FileIdentity& file, uint64_t file_pages,
                               PageRun pages) {
  const auto end = CheckedAdd(pages.first, pages.count);
  if (!end || *end > file_pages || file_pages > ledger_format::kMaxPagesPerFile) {
    return Fail(
        ErrorCode::kInvalid,
        fmt::format("{} pages from page {} of a file of {} pages; at most {} can be accounted",
                    pages.count, pages.first, file_pages, ledger_format::kMaxPagesPerFile));
  }
  if (pages.count == 0) return {};
  MVGPU_ASSIGN_OR_RETURN(const Guard guard, Lock());
  if (!owns(id)) {
    return Fail(ErrorCode::kRevoked,
                fmt::format("row {} of {} was dropped: another process took process {} for dead",
                            id.index, memory_->path(), self_.pid));
  }
  MVGPU_ASSIGN_OR_RETURN(const unsigned index, FindOrAddFileLocked(file, file_pages));
  FileHolds holds(*memory_, index);
  MVGPU_RETURN_IF_ERROR(holds.prepare(id.index, pages));
  holds.hold(id.index, pages);
  return {};
}

void LedgerStore::release(RowId id, const FileIdentity& file, PageRun pages) {
  std::optional<Guard> guard;
  if (pages.count == 0 || !LockForRelease(guard) || !owns(id)) return;
  if (const auto index = FindFileLocked(file)) FileHolds(*memory_, *index).release(id.index, pages);
}

}  // namespace mvgpu::domain
