#include "apionly-domain/accounting/ledger_reader.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <utility>

namespace mvgpu::domain {

using ledger_format::FileRecord;
using ledger_format::LedgerHeader;
using ledger_format::RowRecord;
using ledger_format::SegmentHeader;

std::string PrintableText(const char* text, size_t capacity) {
  std::string result(text, ::strnlen(text, capacity));
  for (char& c : result) {
    if (c < 0x20 || c > 0x7e) c = '?';
  }
  return result;
}

Result<void> LedgerReader::ReadAt(uint64_t offset, void* to, uint64_t bytes) const {
  auto* at = static_cast<char*>(to);
  for (uint64_t done = 0; done < bytes;) {
    const ssize_t n = ::pread(fd_, at + done, bytes - done, static_cast<off_t>(offset + done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return FailSystem(errno, fmt::format("cannot read {}", path_));
    if (n == 0) return Damaged<uint64_t>("the size", offset + done, offset + bytes);
    done += static_cast<uint64_t>(n);
  }
  return {};
}

Result<void> LedgerReader::ReadHeader() {
  // The size afterwards: the file grows before the header says so.
  MVGPU_RETURN_IF_ERROR(ReadAt(0, &header_, sizeof header_));
  struct stat st = {};
  if (::fstat(fd_, &st) != 0) return FailSystem(errno, fmt::format("cannot stat {}", path_));
  const auto size = static_cast<uint64_t>(st.st_size);
  if (st.st_nlink == 0) return FailSystem(ENOENT, fmt::format("{} was removed", path_));
  if (size < ledger_format::kSegments) {
    return Damaged<uint64_t>("the size", size, ledger_format::kSegments);
  }
  if (header_.magic != ledger_format::kMagic) {
    return Damaged<uint64_t>("the magic number", header_.magic, ledger_format::kMagic);
  }
  if (header_.version != ledger_format::kVersion) {
    return Damaged("the version", header_.version, ledger_format::kVersion);
  }
  const std::pair<uint64_t, uint64_t> geometry[] = {{header_.header_bytes, sizeof(LedgerHeader)},
                                                    {header_.page_shift, ledger_format::kPageShift},
                                                    {header_.lock_bytes, sizeof(pthread_mutex_t)},
                                                    {header_.max_rows, ledger_format::kMaxRows},
                                                    {header_.max_files, ledger_format::kMaxFiles},
                                                    {header_.row_table, ledger_format::kRowTable},
                                                    {header_.file_table, ledger_format::kFileTable},
                                                    {header_.segments, ledger_format::kSegments}};
  for (const auto& [found, expected] : geometry) {
    if (found != expected) return Damaged("a field of the header", found, expected);
  }
  const std::string uuid = PrintableText(header_.vm_uuid, sizeof header_.vm_uuid);
  if (uuid != vm_uuid_) return Damaged("the vm uuid", uuid, vm_uuid_);
  if (header_.end < ledger_format::kSegments || header_.end > ledger_format::kMaxFileBytes) {
    return Damaged<uint64_t>("the end of its segments", header_.end, ledger_format::kSegments);
  }
  if (size < header_.end) return Damaged<uint64_t>("the size", size, header_.end);
  if (header_.file_count > ledger_format::kMaxFiles) {
    return Damaged("the number of files", header_.file_count, ledger_format::kMaxFiles);
  }
  return {};
}

Result<std::vector<RowRecord>> LedgerReader::ReadRows() const {
  std::vector<RowRecord> rows(ledger_format::kMaxRows);
  MVGPU_RETURN_IF_ERROR(
      ReadAt(ledger_format::kRowTable, rows.data(), rows.size() * sizeof(RowRecord)));
  for (unsigned i = 0; i < ledger_format::kMaxRows; ++i) {
    if (rows[i].state == ledger_format::kRowFree || rows[i].state == ledger_format::kRowActive) {
      continue;
    }
    return Damaged<uint32_t>(fmt::format("the state of row {}", i), rows[i].state,
                             ledger_format::kRowActive);
  }
  return rows;
}

Result<std::optional<FileRecord>> LedgerReader::ReadFileRecord(unsigned index) const {
  FileRecord record = {};
  MVGPU_RETURN_IF_ERROR(
      ReadAt(ledger_format::kFileTable + index * sizeof record, &record, sizeof record));
  if (record.state == ledger_format::kFileFree) return std::nullopt;
  if (record.state != ledger_format::kFileUsed) {
    return Damaged<uint32_t>(fmt::format("the state of file {}", index), record.state,
                             ledger_format::kFileUsed);
  }
  return record;
}

Result<LedgerReader::Segment> LedgerReader::ReadSegment(uint64_t offset, uint32_t kind,
                                                        unsigned file, unsigned row) {
  const std::string what = fmt::format("the segment of kind {} at {}", kind, offset);
  if (offset < ledger_format::kSegments || offset % ledger_format::kAlignment != 0 ||
      offset > header_.end - ledger_format::kAlignment) {
    return Damaged<uint64_t>(what + ", its offset,", offset, ledger_format::kSegments);
  }
  SegmentHeader head = {};
  MVGPU_RETURN_IF_ERROR(ReadAt(offset, &head, sizeof head));
  if (head.magic != ledger_format::kSegmentMagic) {
    return Damaged(what + ", its magic number,", head.magic, ledger_format::kSegmentMagic);
  }
  if (head.kind != kind) return Damaged(what + ", its kind,", head.kind, kind);
  if (head.file != file) return Damaged(what + ", its file,", head.file, file);
  if (head.row != row) return Damaged(what + ", its row,", head.row, row);
  if (head.pages == 0 || head.pages > ledger_format::kMaxPagesPerFile) {
    return Damaged(what + ", its pages,", head.pages, ledger_format::kMaxPagesPerFile);
  }
  const ledger_format::SegmentGeometry geometry = ledger_format::GeometryOf(kind, head.pages);
  if (head.chunks != geometry.chunks) {
    return Damaged(what + ", its chunks,", head.chunks, geometry.chunks);
  }
  if (geometry.bytes > header_.end - offset) {
    return Damaged<uint64_t>(what + ", its end,", offset + geometry.bytes, header_.end);
  }
  // Segments do not overlap, so together they are no larger than the file. This bounds our work.
  segment_bytes_ += geometry.bytes;
  if (segment_bytes_ > header_.end) {
    return Damaged("the sum of its segments", segment_bytes_, header_.end);
  }
  Segment segment;
  segment.data = offset + geometry.data;
  segment.directory.resize((geometry.chunks + 63) / 64);
  MVGPU_RETURN_IF_ERROR(ReadAt(offset + sizeof head, segment.directory.data(),
                               segment.directory.size() * sizeof(uint64_t)));
  if (geometry.chunks % 64 != 0 && (segment.directory.back() >> (geometry.chunks % 64)) != 0) {
    return Damaged<uint64_t>(what + ", its directory behind the last chunk,",
                             segment.directory.back() >> (geometry.chunks % 64), 0);
  }
  return segment;
}

bool LedgerReader::was_locked() const {
  if (header_.magic != ledger_format::kMagic) return false;
  LedgerHeader now = {};
  if (!ReadAt(0, &now, sizeof now)) return true;
  return header_.sequence % 2 != 0 || header_.sequence != now.sequence;
}

}  // namespace mvgpu::domain
