#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <fmt/format.h>

#include "apionly-domain/accounting/ledger_format.h"
#include "apionly-domain/base/error.h"

namespace mvgpu::domain {

// Takes a ledger file apart without taking part in it. Nothing in the file is trusted: it is copied
// with pread(), so it may shrink meanwhile, and every offset and size is checked before it is
// followed. What the records mean is the business of those who use this.
//
// Errors of all reads: kCorrupt (what was found and expected), kSystem (ENOENT: it was removed).
class LedgerReader {
 public:
  struct Segment {
    uint64_t data = 0;  // offset in the file
    std::vector<uint64_t> directory;

    bool present(uint64_t chunk) const {
      return chunk / 64 < directory.size() && (directory[chunk / 64] >> (chunk % 64) & 1) != 0;
    }
    uint64_t chunks() const { return directory.size() * 64; }
  };

  // `path` is for messages; it and `vm_uuid` outlive the reader.
  LedgerReader(int fd, const std::string& path, const std::string& vm_uuid)
      : fd_(fd), path_(path), vm_uuid_(vm_uuid) {}

  // Comes first of all, but for ReadRows().
  Result<void> ReadHeader();
  // As ReadHeader() found it; all zero before.
  const ledger_format::LedgerHeader& header() const { return header_; }

  // All kMaxRows of them, those that are free too.
  Result<std::vector<ledger_format::RowRecord>> ReadRows() const;
  // nullopt: the record is not in use. REQUIRES: index < header().file_count.
  Result<std::optional<ledger_format::FileRecord>> ReadFileRecord(unsigned index) const;
  // Segments that overlap are noticed when there are enough of them: so the work of reading all is
  // bounded by the size of the file.
  Result<Segment> ReadSegment(uint64_t offset, uint32_t kind, unsigned file, unsigned row);
  Result<void> ReadAt(uint64_t offset, void* to, uint64_t bytes) const;

  // Whether somebody had the ledger's lock since ReadHeader().
  bool was_locked() const;

  const std::string& path() const { return path_; }
  const std::string& vm_uuid() const { return vm_uuid_; }

 private:
  template <typename T>
  tl::unexpected<Error> Damaged(std::string_view what, T found, T expected) const {
    return Fail(ErrorCode::kCorrupt,
                fmt::format("{} is not a ledger of this version, or damaged: {} is {}, expected {}",
                            path_, what, found, expected));
  }

  const int fd_;
  const std::string& path_;
  const std::string& vm_uuid_;
  uint64_t segment_bytes_ = 0;
  ledger_format::LedgerHeader header_ = {};
};

// Text of a file that may be anything, for a terminal: printable ASCII, '?' in place of the rest.
std::string PrintableText(const char* text, size_t capacity);

}  // namespace mvgpu::domain
