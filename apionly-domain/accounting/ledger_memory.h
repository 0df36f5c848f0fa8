#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "apionly-domain/accounting/ledger_format.h"
#include "apionly-domain/accounting/process_info.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/base/unique_fd.h"

namespace mvgpu::domain {

inline ProcessId OwnerOf(const ledger_format::RowRecord& row) {
  return {row.pid, row.start_time, row.pid_namespace};
}

// A segment of the ledger file, whose header was found to be in order. Points into the mapping.
struct LedgerSegment {
  std::byte* data = nullptr;
  uint64_t* directory = nullptr;
  uint64_t chunks = 0;

  // Acquire: a chunk that is present was allocated.
  bool present(uint64_t chunk) const {
    return chunk < chunks &&
           (std::atomic_ref<uint64_t>(directory[chunk / 64]).load(std::memory_order_acquire) >>
                (chunk % 64) &
            1) != 0;
  }
  // Null when the chunk is not there, that is all zero.
  std::byte* chunk(uint64_t index) const {
    return present(index) ? data + index * ledger_format::kChunkBytes : nullptr;
  }
  // The same for chunks of hold segments.
  uint64_t* words(uint64_t index) const { return reinterpret_cast<uint64_t*>(chunk(index)); }
};

// The mapped ledger file: its tables, and the space for segments. Knows nothing of locks, holds or
// charges. Whatever is found in the file is checked before it is followed, so that a damaged file
// cannot lead anywhere outside of it.
//
// REQUIRES of everything that changes anything: the ledger's lock is held.
class LedgerMemory {
 public:
  // Lays out an empty file: tables, no rows, the lock ready. Errors: kLimit (file system full),
  // kSystem.
  static Result<std::unique_ptr<LedgerMemory>> Create(UniqueFd fd, std::string path,
                                                      const std::string& vm_uuid);
  // Maps a file that CheckLedgerFile() found to be in order. Errors: kSystem.
  static Result<std::unique_ptr<LedgerMemory>> Map(UniqueFd fd, std::string path);
  ~LedgerMemory();
  // Makes the lock anew, for a file that the dead have left. REQUIRES: nobody else has it open.
  // Errors: kSystem.
  Result<void> renew_lock();
  LedgerMemory(const LedgerMemory&) = delete;
  LedgerMemory& operator=(const LedgerMemory&) = delete;

  const std::string& path() const { return path_; }
  int fd() const { return fd_.get(); }
  ledger_format::LedgerHeader& header() const {
    return *reinterpret_cast<ledger_format::LedgerHeader*>(base_);
  }
  // REQUIRES: index < kMaxRows.
  ledger_format::RowRecord& row(unsigned index) const;
  // REQUIRES: index < kMaxFiles; records from file_count() on are not allocated yet.
  ledger_format::FileRecord& file(unsigned index) const;
  unsigned file_count() const;
  Result<void> allocate_file_record(unsigned index);

  // Makes an empty segment of `pages` pages; returns its offset. Errors: kLimit (file system or
  // ledger full), kSystem.
  Result<uint64_t> add_segment(uint32_t kind, unsigned file, unsigned row, uint64_t pages);
  // nullopt when no such segment is at the offset; row is 0 for payer segments, file for mappings.
  std::optional<LedgerSegment> segment(uint64_t offset, uint32_t kind, unsigned file,
                                       unsigned row) const;
  // What the file's record leads to. REQUIRES: file < file_count(), row < kMaxRows.
  std::optional<LedgerSegment> hold_segment(unsigned file, unsigned row) const {
    return segment(this->file(file).hold_segment[row], ledger_format::kHoldSegment, file, row);
  }
  std::optional<LedgerSegment> payer_segment(unsigned file) const {
    return segment(this->file(file).payer_segment, ledger_format::kPayerSegment, file, 0);
  }
  std::optional<LedgerSegment> mapping_segment(unsigned row) const {
    return segment(this->row(row).mapping_segment, ledger_format::kMappingSegment, 0, row);
  }
  // After this the chunk may be written. Errors: kLimit (file system full), kInvalid (no such
  // chunk).
  Result<void> make_present(const LedgerSegment& segment, uint64_t chunk);
  // Makes the segment empty and gives its memory back. REQUIRES: nobody else uses it any more, and
  // all its data is zero, or nobody will use it again.
  void discard(const LedgerSegment& segment);

 private:
  LedgerMemory(UniqueFd fd, std::string path, std::byte* base)
      : fd_(std::move(fd)), path_(std::move(path)), base_(base) {}
  Result<void> allocate(uint64_t offset, uint64_t bytes) const;
  tl::unexpected<Error> SpaceError(int sys_errno, uint64_t bytes) const;

  const UniqueFd fd_;
  const std::string path_;
  std::byte* const base_;  // kMaxFileBytes, reaching beyond the file's end
};

}  // namespace mvgpu::domain
