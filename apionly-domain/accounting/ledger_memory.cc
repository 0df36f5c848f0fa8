#include "apionly-domain/accounting/ledger_memory.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "apionly-domain/base/check.h"

namespace mvgpu::domain {

using ledger_format::FileRecord;
using ledger_format::LedgerHeader;
using ledger_format::RowRecord;
using ledger_format::SegmentHeader;

namespace {

// A mutex that processes share and that survives its owner. With priority inheritance, because the
// kernel hands such a one to the next waiter; otherwise a busy process takes it again before the
// waiter wakes up.
Result<void> InitializeLock(void* at) {
  pthread_mutexattr_t attributes;
  int error = pthread_mutexattr_init(&attributes);
  if (error == 0) {
    error = pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    if (error == 0) error = pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    if (error == 0) error = pthread_mutexattr_setprotocol(&attributes, PTHREAD_PRIO_INHERIT);
    if (error == 0) error = pthread_mutex_init(static_cast<pthread_mutex_t*>(at), &attributes);
    pthread_mutexattr_destroy(&attributes);
  }
  if (error != 0) return FailSystem(error, "cannot make a robust mutex");
  return {};
}

}  // namespace

Result<std::unique_ptr<LedgerMemory>> LedgerMemory::Map(UniqueFd fd, std::string path) {
  void* base = ::mmap(nullptr, ledger_format::kMaxFileBytes, PROT_READ | PROT_WRITE,
                      MAP_SHARED | MAP_NORESERVE, fd.get(), 0);
  if (base == MAP_FAILED) {
    return FailSystem(errno, fmt::format("cannot map {} (needs {} GiB of address space)", path,
                                         ledger_format::kMaxFileBytes >> 30));
  }
  return std::unique_ptr<LedgerMemory>(
      new LedgerMemory(std::move(fd), std::move(path), static_cast<std::byte*>(base)));
}

Result<std::unique_ptr<LedgerMemory>> LedgerMemory::Create(UniqueFd fd, std::string path,
                                                           const std::string& vm_uuid) {
  MVGPU_CHECK(vm_uuid.size() < sizeof(LedgerHeader::vm_uuid));
  if (::ftruncate(fd.get(), static_cast<off_t>(ledger_format::kSegments)) != 0) {
    return FailSystem(errno, fmt::format("cannot size {}", path));
  }
  MVGPU_ASSIGN_OR_RETURN(std::unique_ptr<LedgerMemory> memory, Map(std::move(fd), std::move(path)));
  MVGPU_RETURN_IF_ERROR(memory->allocate(0, ledger_format::kFileTable));
  LedgerHeader& header = memory->header();
  header.version = ledger_format::kVersion;
  header.header_bytes = sizeof(LedgerHeader);
  header.page_shift = ledger_format::kPageShift;
  header.lock_bytes = sizeof(pthread_mutex_t);
  header.max_rows = ledger_format::kMaxRows;
  header.max_files = ledger_format::kMaxFiles;
  header.row_table = ledger_format::kRowTable;
  header.file_table = ledger_format::kFileTable;
  header.segments = ledger_format::kSegments;
  std::memcpy(header.vm_uuid, vm_uuid.data(), vm_uuid.size());
  header.end = ledger_format::kSegments;
  header.next_token = 1;
  header.next_layout = 1;
  MVGPU_RETURN_IF_ERROR(InitializeLock(header.lock));
  header.magic = ledger_format::kMagic;
  return memory;
}

Result<void> LedgerMemory::renew_lock() {
  std::memset(header().lock, 0, sizeof(LedgerHeader::lock));
  return InitializeLock(header().lock);
}

LedgerMemory::~LedgerMemory() { ::munmap(base_, ledger_format::kMaxFileBytes); }

RowRecord& LedgerMemory::row(unsigned index) const {
  MVGPU_CHECK(index < ledger_format::kMaxRows);
  return reinterpret_cast<RowRecord*>(base_ + ledger_format::kRowTable)[index];
}

FileRecord& LedgerMemory::file(unsigned index) const {
  MVGPU_CHECK(index < ledger_format::kMaxFiles);
  return reinterpret_cast<FileRecord*>(base_ + ledger_format::kFileTable)[index];
}

unsigned LedgerMemory::file_count() const {
  return std::min(header().file_count, ledger_format::kMaxFiles);
}

Result<void> LedgerMemory::allocate_file_record(unsigned index) {
  return allocate(ledger_format::kFileTable + index * sizeof(FileRecord), sizeof(FileRecord));
}

tl::unexpected<Error> LedgerMemory::SpaceError(int sys_errno, uint64_t bytes) const {
  if (sys_errno == ENOSPC || sys_errno == EDQUOT || sys_errno == EFBIG || sys_errno == ENOMEM) {
    return Fail(ErrorCode::kLimit,
                fmt::format("no room for {} more bytes of {}; enlarge or clear its file system",
                            bytes, path_));
  }
  return FailSystem(sys_errno,
                    fmt::format("cannot get {} more bytes of {}; use a tmpfs", bytes, path_));
}

Result<void> LedgerMemory::allocate(uint64_t offset, uint64_t bytes) const {
  while (::fallocate(fd_.get(), 0, static_cast<off_t>(offset), static_cast<off_t>(bytes)) != 0) {
    if (errno != EINTR) return SpaceError(errno, bytes);
  }
  return {};
}

Result<uint64_t> LedgerMemory::add_segment(uint32_t kind, unsigned file, unsigned row,
                                           uint64_t pages) {
  if (pages == 0 || pages > ledger_format::kMaxPagesPerFile) {
    return Fail(ErrorCode::kLimit,
                fmt::format("{}: a file of {} pages; at most {} can be accounted", path_, pages,
                            ledger_format::kMaxPagesPerFile));
  }
  const ledger_format::SegmentGeometry geometry = ledger_format::GeometryOf(kind, pages);
  const uint64_t offset = header().end;
  if (offset < ledger_format::kSegments || offset % ledger_format::kAlignment != 0) {
    return Fail(ErrorCode::kCorrupt,
                fmt::format("{} is damaged: the end of its segments is {}", path_, offset));
  }
  if (offset > ledger_format::kMaxFileBytes ||
      geometry.bytes > ledger_format::kMaxFileBytes - offset) {
    return Fail(
        ErrorCode::kLimit,
        fmt::format("{}: {} bytes are given out and {} more wanted, at most {} are possible; "
                    "restart the vm's domains",
                    path_, offset, geometry.bytes, ledger_format::kMaxFileBytes));
  }
  struct stat st = {};
  if (::fstat(fd_.get(), &st) != 0) return FailSystem(errno, fmt::format("cannot stat {}", path_));
  const auto new_end = static_cast<off_t>(offset + geometry.bytes);
  if (st.st_size < new_end && ::ftruncate(fd_.get(), new_end) != 0) {
    return SpaceError(errno, geometry.bytes);
  }
  MVGPU_RETURN_IF_ERROR(allocate(offset, geometry.data));
  // A process that dies from here on leaks the space: nothing refers to it.
  header().end = offset + geometry.bytes;
  auto* head = reinterpret_cast<SegmentHeader*>(base_ + offset);
  *head = {ledger_format::kSegmentMagic,
           kind,
           file,
           row,
           pages,
           geometry.chunks,
           geometry.data,
           geometry.bytes,
           {}};
  return offset;
}

std::optional<LedgerSegment> LedgerMemory::segment(uint64_t offset, uint32_t kind, unsigned file,
                                                   unsigned row) const {
  const uint64_t end = std::min(header().end, ledger_format::kMaxFileBytes);
  if (offset < ledger_format::kSegments || offset % ledger_format::kAlignment != 0 ||
      offset > end || end - offset < ledger_format::kAlignment) {
    return std::nullopt;
  }
  auto* head = reinterpret_cast<SegmentHeader*>(base_ + offset);
  const uint64_t pages = head->pages;
  if (head->magic != ledger_format::kSegmentMagic || head->kind != kind || head->file != file ||
      head->row != row || pages == 0 || pages > ledger_format::kMaxPagesPerFile) {
    return std::nullopt;
  }
  const ledger_format::SegmentGeometry geometry = ledger_format::GeometryOf(kind, pages);
  if (geometry.bytes > end - offset) return std::nullopt;
  return LedgerSegment{base_ + offset + geometry.data, reinterpret_cast<uint64_t*>(head + 1),
                       geometry.chunks};
}

Result<void> LedgerMemory::make_present(const LedgerSegment& segment, uint64_t chunk) {
  if (segment.present(chunk)) return {};
  if (chunk >= segment.chunks) {
    return Fail(ErrorCode::kInvalid, fmt::format("{}: chunk {} of a segment of {} chunks", path_,
                                                 chunk, segment.chunks));
  }
  const auto at = static_cast<uint64_t>(segment.data - base_) + chunk * ledger_format::kChunkBytes;
  MVGPU_RETURN_IF_ERROR(allocate(at, ledger_format::kChunkBytes));
  // Release: whoever sees it present finds it allocated.
  std::atomic_ref<uint64_t>(segment.directory[chunk / 64])
      .fetch_or(uint64_t{1} << (chunk % 64), std::memory_order_release);
  return {};
}

void LedgerMemory::discard(const LedgerSegment& segment) {
  std::memset(segment.directory, 0, (segment.chunks + 63) / 64 * sizeof(uint64_t));
  const auto at = static_cast<off_t>(segment.data - base_);
  const auto bytes = static_cast<off_t>(segment.chunks * ledger_format::kChunkBytes);
  // Best effort: without it the memory stays until the file goes.
  (void)::fallocate(fd_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, bytes);
}

}  // namespace mvgpu::domain
