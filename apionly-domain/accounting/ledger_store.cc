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

#include "apionly-domain/accounting/change_gate.h"
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

tl::unexpected<Error> LedgerStore::Dropped(RowId id) const {
  return Fail(ErrorCode::kRevoked,
              fmt::format("row {} of {} was dropped: another process took process {} for dead",
                          id.index, memory_->path(), self_.pid));
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
  ++header.repairs;
}

void LedgerStore::DropRowLocked(unsigned index) {
  RowRecord& row = memory_->row(index);
  if (ledger_format::LoadWord(row.changes) % 2 != 0) ++memory_->header().repairs;
  ledger_format::StoreWord(row.token, uint64_t{0});
  for (unsigned i = 0; i < memory_->file_count(); ++i) {
    const FileRecord& file = memory_->file(i);
    if (file.state == ledger_format::kFileUsed && (file.holder_rows >> index & 1) != 0) {
      FileHolds(*memory_, i).drop(index);
    }
  }
  Publish(row.state, static_cast<uint32_t>(ledger_format::kRowFree));
}

unsigned LedgerStore::ReclaimLocked() {
  unsigned live = 0;
  for (unsigned i = 0; i < ledger_format::kMaxRows; ++i) {
    RowRecord& row = memory_->row(i);
    if (row.state != ledger_format::kRowActive) continue;
    // Without a token: somebody died who was about to drop it.
    if (row.token == 0 || LivenessOf(OwnerOf(row)) == Liveness::kDead) {
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
    const uint64_t mapping_segment = row.mapping_segment;
    const uint64_t mapping_sequence = row.mapping_sequence;
    row = RowRecord{};
    row.mapping_segment = mapping_segment;
    row.mapping_sequence = (mapping_sequence | 1) + 1;
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

Result<void> LedgerStore::give_row(RowId id, const ProcessId& owner) {
  MVGPU_ASSIGN_OR_RETURN(const Guard guard, Lock());
  if (!owns(id)) return Dropped(id);
  RowRecord& row = memory_->row(id.index);
  row.flags |= ledger_format::kRowRegistered;
  // Half of it names nobody: no process has the number of the one and the start of the other.
  row.start_time = owner.start_time;
  row.pid_namespace = owner.pid_namespace;
  Publish(row.pid, owner.pid);
  return {};
}

Result<unsigned> LedgerStore::drop_given_rows(const ProcessId& owner) {
  MVGPU_ASSIGN_OR_RETURN(const Guard guard, Lock());
  unsigned dropped = 0;
  for (unsigned i = 0; i < ledger_format::kMaxRows; ++i) {
    const RowRecord& row = memory_->row(i);
    if (!ledger_format::IsRegistered(row) || OwnerOf(row) != owner) continue;
    DropRowLocked(i);
    ++dropped;
  }
  return dropped;
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

// True if nothing of the file is held: then nobody knows the record any more.
bool LedgerStore::FreeFileLocked(unsigned index) {
  FileHolds holds(*memory_, index);
  if (!holds.is_empty()) return false;  // most are not, and are left undisturbed
  StopChanges(*memory_, index);
  if (!ChangesFinished(*memory_) || !holds.is_empty()) return false;
  holds.reset();
  Publish(memory_->file(index).state, static_cast<uint32_t>(ledger_format::kFileFree));
  return true;
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
    if (memory_->file(i).state == ledger_format::kFileFree || FreeFileLocked(i)) return i;
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
  StopChanges(*memory_, index);  // gives it a layout that it never had
  Publish(file.state, static_cast<uint32_t>(ledger_format::kFileUsed));
  return index;
}

Result<FileView> LedgerStore::make_room(RowId id, const FileIdentity& file, uint64_t file_pages,
                                        PageRun pages) {
  MVGPU_ASSIGN_OR_RETURN(const Guard guard, Lock());
  if (!owns(id)) return Dropped(id);
  MVGPU_ASSIGN_OR_RETURN(const unsigned index, FindOrAddFileLocked(file, file_pages));
  FileHolds holds(*memory_, index);
  MVGPU_RETURN_IF_ERROR(holds.make_room(id.index, pages));
  return holds.view_of(id.index);
}

Result<LedgerSegment> LedgerStore::make_mapping_room(RowId id, uint32_t place) {
  MVGPU_ASSIGN_OR_RETURN(const Guard guard, Lock());
  if (!owns(id)) return Dropped(id);
  auto segment = memory_->mapping_segment(id.index);
  if (!segment) {
    MVGPU_ASSIGN_OR_RETURN(const uint64_t offset,
                           memory_->add_segment(ledger_format::kMappingSegment, 0, id.index,
                                                ledger_format::kMaxMappings));
    ledger_format::StoreWord(memory_->row(id.index).mapping_segment, offset);
    segment = memory_->mapping_segment(id.index);
  }
  if (!segment || place / ledger_format::kMappingsPerChunk >= segment->chunks) {
    return Fail(ErrorCode::kCorrupt,
                fmt::format("{} is damaged: the mappings of row {}", memory_->path(), id.index));
  }
  MVGPU_RETURN_IF_ERROR(memory_->make_present(*segment, place / ledger_format::kMappingsPerChunk));
  return *segment;
}

std::optional<FileView> LedgerStore::look_up(RowId id, const FileIdentity& file) {
  std::optional<Guard> guard;
  if (!LockForRelease(guard) || !owns(id)) return std::nullopt;
  const auto index = FindFileLocked(file);
  if (!index) return std::nullopt;
  return FileHolds(*memory_, *index).view_of(id.index);
}

uint64_t LedgerStore::charged_pages(RowId id) {
  std::optional<Guard> guard;
  if (!LockForRelease(guard) || !owns(id)) return 0;
  uint64_t pages = 0;
  for (unsigned i = 0; i < memory_->file_count(); ++i) {
    if (memory_->file(i).state != ledger_format::kFileUsed) continue;
    pages += FileHolds(*memory_, i).charged_pages(id.index);
  }
  return pages;
}

}  // namespace mvgpu::domain
