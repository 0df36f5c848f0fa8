#include "apionly-domain/accounting/ledger_view.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstring>
#include <optional>
#include <span>
#include <thread>
#include <utility>

#include "apionly-domain/accounting/ledger_format.h"
#include "apionly-domain/accounting/payer_rule.h"

namespace mvgpu::domain {

using ledger_format::FileRecord;
using ledger_format::kChunkBytes;
using ledger_format::LedgerHeader;
using ledger_format::RowRecord;
using ledger_format::SegmentHeader;

namespace {

constexpr int kAttempts = 5;
constexpr auto kPause = std::chrono::milliseconds(1);

// One attempt at a copy.
class Reader {
 public:
  Reader(int fd, const std::string& path, const std::string& vm_uuid)
      : fd_(fd), path_(path), vm_uuid_(vm_uuid) {}

  Result<LedgerSnapshot> Read();
  // After Read(): whether somebody changed the ledger meanwhile. What was read may be off then, or
  // look broken.
  bool was_in_motion() const;

 private:
  struct Segment {
    uint64_t data = 0;  // offset in the file
    std::vector<uint64_t> directory;

    bool present(uint64_t chunk) const {
      return chunk / 64 < directory.size() && (directory[chunk / 64] >> (chunk % 64) & 1) != 0;
    }
    uint64_t chunks() const { return directory.size() * 64; }
  };
  struct Holders {
    std::vector<uint8_t> rows;
    std::vector<Segment> segments;
    std::optional<Segment> payers;
    std::vector<std::vector<uint64_t>> words;  // of one chunk, by holder
    std::vector<uint8_t> payer_bytes;          // of the same pages
  };

  Result<void> ReadAt(uint64_t offset, void* to, uint64_t bytes) const;
  Result<void> ReadHeader();
  Result<void> ReadRows();
  Result<void> ReadFile(unsigned index);
  Result<Segment> ReadSegment(uint64_t offset, uint32_t kind, unsigned file, unsigned row);
  Result<void> ReadChunk(const FileRecord& record, uint64_t chunk, Holders& holders);
  Result<void> ReadPayerBytes(uint64_t chunk, Holders& holders) const;
  void CountWord(const FileRecord& record, uint64_t word, const Holders& holders);
  template <typename T>
  tl::unexpected<Error> Damaged(std::string_view what, T found, T expected) const;

  const int fd_;
  const std::string& path_;
  const std::string& vm_uuid_;
  uint64_t size_ = 0;
  uint64_t segment_bytes_ = 0;
  LedgerHeader header_ = {};
  LedgerSnapshot snapshot_;
  int row_at_[ledger_format::kMaxRows];  // index into snapshot_.rows, -1: free
};

std::string Printable(const char* text, size_t capacity) {
  std::string result(text, ::strnlen(text, capacity));
  for (char& c : result) {
    if (c < 0x20 || c > 0x7e) c = '?';
  }
  return result;
}

template <typename T>
tl::unexpected<Error> Reader::Damaged(std::string_view what, T found, T expected) const {
  return Fail(ErrorCode::kCorrupt,
              fmt::format("{} is not a ledger of this version, or damaged: {} is {}, expected {}",
                          path_, what, found, expected));
}

Result<void> Reader::ReadAt(uint64_t offset, void* to, uint64_t bytes) const {
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

Result<void> Reader::ReadHeader() {
  struct stat st = {};
  if (::fstat(fd_, &st) != 0) return FailSystem(errno, fmt::format("cannot stat {}", path_));
  size_ = static_cast<uint64_t>(st.st_size);
  if (st.st_nlink == 0) return FailSystem(ENOENT, fmt::format("{} was removed", path_));
  if (size_ < ledger_format::kSegments) {
    return Damaged<uint64_t>("the size", size_, ledger_format::kSegments);
  }
  MVGPU_RETURN_IF_ERROR(ReadAt(0, &header_, sizeof header_));
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
  const std::string uuid = Printable(header_.vm_uuid, sizeof header_.vm_uuid);
  if (uuid != vm_uuid_) return Damaged("the vm uuid", uuid, vm_uuid_);
  if (header_.end < ledger_format::kSegments || header_.end > ledger_format::kMaxFileBytes) {
    return Damaged<uint64_t>("the end of its segments", header_.end, ledger_format::kSegments);
  }
  if (size_ < header_.end) return Damaged<uint64_t>("the size", size_, header_.end);
  if (header_.file_count > ledger_format::kMaxFiles) {
    return Damaged("the number of files", header_.file_count, ledger_format::kMaxFiles);
  }
  return {};
}

Result<void> Reader::ReadRows() {
  std::vector<RowRecord> records(ledger_format::kMaxRows);
  MVGPU_RETURN_IF_ERROR(
      ReadAt(ledger_format::kRowTable, records.data(), records.size() * sizeof(RowRecord)));
  for (unsigned i = 0; i < ledger_format::kMaxRows; ++i) {
    const RowRecord& record = records[i];
    row_at_[i] = -1;
    if (record.state == ledger_format::kRowFree) continue;
    if (record.state != ledger_format::kRowActive) {
      return Damaged<uint32_t>(fmt::format("the state of row {}", i), record.state,
                               ledger_format::kRowActive);
    }
    LedgerSnapshot::Row row;
    row.index = i;
    row.name = Printable(record.name, sizeof record.name);
    row.pin_backend = Printable(record.pin_backend, sizeof record.pin_backend);
    row.kind = record.kind;
    row.owner = {record.pid, record.start_time, record.pid_namespace};
    row.liveness = LivenessOf(row.owner);
    row.granule_pages = record.granule_pages;
    row.mapped_pages = record.mapped_pages;
    row.pinned_pages = record.pinned_pages;
    row.locked_pages = record.locked_pages;
    row.locked_areas = record.locked_areas;
    row.area_budget = record.area_budget;
    row.unique_pages = record.unique_pages;
    row.charged_pages = record.charged_pages;
    row_at_[i] = static_cast<int>(snapshot_.rows.size());
    snapshot_.rows.push_back(std::move(row));
  }
  return {};
}

Result<Reader::Segment> Reader::ReadSegment(uint64_t offset, uint32_t kind, unsigned file,
                                            unsigned row) {
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

Result<void> Reader::ReadFile(unsigned index) {
  FileRecord record = {};
  MVGPU_RETURN_IF_ERROR(
      ReadAt(ledger_format::kFileTable + index * sizeof record, &record, sizeof record));
  if (record.state == ledger_format::kFileFree) return {};
  if (record.state != ledger_format::kFileUsed) {
    return Damaged<uint32_t>(fmt::format("the state of file {}", index), record.state,
                             ledger_format::kFileUsed);
  }
  snapshot_.files.push_back({{record.device, record.inode}, record.pages});
  Holders holders;
  uint64_t chunks = 0;
  for (uint64_t rows = record.holder_rows; rows != 0; rows &= rows - 1) {
    const auto row = static_cast<unsigned>(std::countr_zero(rows));
    MVGPU_ASSIGN_OR_RETURN(Segment segment, ReadSegment(record.hold_segment[row],
                                                        ledger_format::kHoldSegment, index, row));
    chunks = std::max(chunks, segment.chunks());
    holders.rows.push_back(static_cast<uint8_t>(row));
    holders.segments.push_back(std::move(segment));
  }
  holders.words.resize(holders.rows.size());
  if (record.payer_segment != 0) {
    MVGPU_ASSIGN_OR_RETURN(
        holders.payers, ReadSegment(record.payer_segment, ledger_format::kPayerSegment, index, 0));
    chunks = std::max(chunks, holders.payers->chunks() * ledger_format::kPagesPerPayerChunk /
                                  ledger_format::kPagesPerHoldChunk);
  }
  for (uint64_t chunk = 0; chunk < chunks; ++chunk) {
    MVGPU_RETURN_IF_ERROR(ReadChunk(record, chunk, holders));
  }
  return {};
}

Result<void> Reader::ReadPayerBytes(uint64_t chunk, Holders& holders) const {
  constexpr uint64_t kPerChunk =
      ledger_format::kPagesPerHoldChunk / ledger_format::kPagesPerPayerChunk;
  holders.payer_bytes.clear();
  if (!holders.payers) return {};
  for (uint64_t i = 0; i < kPerChunk; ++i) {
    if (!holders.payers->present(chunk * kPerChunk + i)) continue;
    holders.payer_bytes.resize(kPerChunk * kChunkBytes);
    MVGPU_RETURN_IF_ERROR(ReadAt(holders.payers->data + (chunk * kPerChunk + i) * kChunkBytes,
                                 holders.payer_bytes.data() + i * kChunkBytes, kChunkBytes));
  }
  return {};
}

Result<void> Reader::ReadChunk(const FileRecord& record, uint64_t chunk, Holders& holders) {
  MVGPU_RETURN_IF_ERROR(ReadPayerBytes(chunk, holders));
  bool any = !holders.payer_bytes.empty();
  for (size_t i = 0; i < holders.rows.size(); ++i) {
    holders.words[i].assign(ledger_format::kWordsPerChunk, 0);
    if (!holders.segments[i].present(chunk)) continue;
    any = true;
    MVGPU_RETURN_IF_ERROR(ReadAt(holders.segments[i].data + chunk * kChunkBytes,
                                 holders.words[i].data(), kChunkBytes));
  }
  if (!any) return {};
  for (uint64_t word = 0; word < ledger_format::kWordsPerChunk; ++word) {
    CountWord(record, chunk * ledger_format::kWordsPerChunk + word, holders);
  }
  return {};
}

void Reader::CountWord(const FileRecord& record, uint64_t word, const Holders& holders) {
  LedgerSnapshot::File& file = snapshot_.files.back();
  const auto count = static_cast<unsigned>(holders.rows.size());
  const uint64_t in_chunk = word % ledger_format::kWordsPerChunk;
  const uint8_t* payer_bytes =
      holders.payer_bytes.empty()
          ? nullptr
          : holders.payer_bytes.data() + in_chunk * ledger_format::kPagesPerWord;
  uint64_t held[ledger_format::kMaxRows];
  uint64_t paid[ledger_format::kMaxRows];
  uint64_t any = 0;
  for (unsigned i = 0; i < count; ++i) {
    held[i] = holders.words[i][in_chunk];
    any |= held[i];
  }
  for (unsigned page = 0; payer_bytes != nullptr && page < ledger_format::kPagesPerWord; ++page) {
    if (payer_bytes[page] == 0) continue;
    bool holds = false;
    for (unsigned i = 0; i < count; ++i) {
      holds |= holders.rows[i] + 1 == payer_bytes[page] && (held[i] >> page & 1) != 0;
    }
    if (!holds) ++file.stale_payers;
  }
  if (any == 0) return;
  DividePages(holders.rows.data(), held, count, payer_bytes, paid);
  for (unsigned i = 0; i < count; ++i) {
    const int at = row_at_[holders.rows[i]];
    if (at < 0) {
      file.pages_of_free_rows += CountPages(held[i]);
      continue;
    }
    snapshot_.rows[static_cast<size_t>(at)].counted_unique_pages += CountPages(held[i]);
    snapshot_.rows[static_cast<size_t>(at)].counted_charged_pages += CountPages(paid[i]);
  }
  file.unique_pages += CountPages(any);
  const uint64_t first = word * ledger_format::kPagesPerWord;
  if (first >= record.pages) {
    file.pages_beyond_end += CountPages(any);
  } else if (record.pages - first < ledger_format::kPagesPerWord) {
    file.pages_beyond_end += CountPages(any >> (record.pages - first));
  }
}

bool Reader::was_in_motion() const {
  if (header_.magic != ledger_format::kMagic) return false;
  LedgerHeader now = {};
  if (!ReadAt(0, &now, sizeof now)) return true;
  return header_.sequence % 2 != 0 || header_.sequence != now.sequence;
}

Result<LedgerSnapshot> Reader::Read() {
  MVGPU_RETURN_IF_ERROR(ReadHeader());
  snapshot_.path = path_;
  snapshot_.vm_uuid = vm_uuid_;
  snapshot_.repairs = header_.repairs;
  MVGPU_RETURN_IF_ERROR(ReadRows());
  for (unsigned i = 0; i < header_.file_count; ++i) MVGPU_RETURN_IF_ERROR(ReadFile(i));
  for (const LedgerSnapshot::File& file : snapshot_.files)
    snapshot_.unique_pages += file.unique_pages;
  snapshot_.in_motion = was_in_motion();
  return std::move(snapshot_);
}

Result<LedgerSnapshot> ReadRepeatedly(int fd, const std::string& path, const std::string& vm_uuid,
                                      bool must_be_quiet) {
  for (int attempt = 1;; ++attempt) {
    Reader reader(fd, path, vm_uuid);
    auto snapshot = reader.Read();
    if (attempt == kAttempts) return snapshot;
    if (snapshot ? !snapshot->in_motion || !must_be_quiet : !reader.was_in_motion())
      return snapshot;
    std::this_thread::sleep_for(kPause);
  }
}

}  // namespace

uint64_t LedgerSnapshot::charged_pages() const {
  uint64_t pages = 0;
  for (const Row& row : rows) pages += row.charged_pages;
  return pages;
}

std::string DomainKindName(uint32_t kind) {
  switch (static_cast<DomainKind>(kind)) {
    case DomainKind::kApiOnly:
      return "api-only";
    case DomainKind::kAssignedDevice:
      return "assigned";
    case DomainKind::kNested:
      return "nested";
  }
  return fmt::format("kind-{}", kind);
}

Result<LedgerSnapshot> ReadLedgerFile(int fd, const std::string& path, const std::string& vm_uuid) {
  return ReadRepeatedly(fd, path, vm_uuid, /*must_be_quiet=*/true);
}

Result<void> CheckLedgerFile(int fd, const std::string& path, const std::string& vm_uuid) {
  MVGPU_RETURN_IF_ERROR(ReadRepeatedly(fd, path, vm_uuid, /*must_be_quiet=*/false));
  return {};
}

Result<LedgerSnapshot> ReadLedger(const RuntimeDir& dir, const std::string& vm_uuid) {
  const std::string name = LedgerFileName(vm_uuid);
  MVGPU_ASSIGN_OR_RETURN(const UniqueFd file, dir.open_file(name, O_RDONLY));
  return ReadLedgerFile(file.get(), dir.path_of(name), vm_uuid);
}

std::vector<std::string> ProblemsOf(const LedgerSnapshot& snapshot) {
  std::vector<std::string> problems;
  for (const LedgerSnapshot::Row& row : snapshot.rows) {
    if (row.unique_pages != row.counted_unique_pages) {
      problems.push_back(fmt::format("row {} ({}) counts {} unique pages but holds {}", row.index,
                                     row.name, row.unique_pages, row.counted_unique_pages));
    }
    if (row.charged_pages != row.counted_charged_pages) {
      problems.push_back(fmt::format("row {} ({}) counts {} charged pages but pays for {}",
                                     row.index, row.name, row.charged_pages,
                                     row.counted_charged_pages));
    }
  }
  if (snapshot.unique_pages != snapshot.charged_pages()) {
    problems.push_back(fmt::format("{} unique pages are held but {} are charged",
                                   snapshot.unique_pages, snapshot.charged_pages()));
  }
  for (const LedgerSnapshot::File& file : snapshot.files) {
    const auto complain = [&](uint64_t pages, std::string_view what) {
      if (pages == 0) return;
      problems.push_back(fmt::format("file {}:{} of {} pages: {} {}", file.identity.device,
                                     file.identity.inode, file.pages, pages, what));
    };
    complain(file.stale_payers, "pages name a payer that does not hold them");
    complain(file.pages_beyond_end, "pages are held beyond its end");
    complain(file.pages_of_free_rows, "pages are held by rows that nobody has");
  }
  return problems;
}

}  // namespace mvgpu::domain
