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
constexpr uint64_t kChunksAtOnce = 32;  // a system call costs as much as copying some 10 KiB
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
  // Of one file.
  struct Holders {
    std::vector<uint8_t> rows;
    std::vector<Segment> segments;
    std::vector<std::vector<uint64_t>> windows;  // kChunksAtOnce of each segment, those present
    std::optional<Segment> payers;
  };
  // 32768 pages of it.
  struct Chunk {
    uint64_t first_page = 0;
    std::vector<uint8_t> rows;           // those that hold any of it
    std::vector<const uint64_t*> words;  // by row
    std::vector<uint8_t> payer_bytes;    // empty: none is named
  };

  Result<void> ReadAt(uint64_t offset, void* to, uint64_t bytes) const;
  Result<void> ReadHeader();
  Result<void> ReadRows();
  Result<void> ReadFile(unsigned index);
  Result<Segment> ReadSegment(uint64_t offset, uint32_t kind, unsigned file, unsigned row);
  // Chunks [first, first + kChunksAtOnce) of all segments.
  Result<void> ReadWindows(uint64_t first, Holders& holders) const;
  Result<void> ReadChunk(uint64_t index, const Holders& holders, Chunk& chunk) const;
  Result<void> ReadPayerBytes(uint64_t index, const Segment& payers, Chunk& chunk) const;
  void CountChunk(const Chunk& chunk);
  void CountWord(const Chunk& chunk, uint64_t word);
  void CountPagesOf(uint8_t row, uint64_t unique, uint64_t charged);
  // After the bits: what the counters allow.
  Result<void> ReadBounds();
  template <typename T>
  tl::unexpected<Error> Damaged(std::string_view what, T found, T expected) const;

  const int fd_;
  const std::string& path_;
  const std::string& vm_uuid_;
  uint64_t size_ = 0;
  uint64_t segment_bytes_ = 0;
  LedgerHeader header_ = {};
  LedgerSnapshot snapshot_;
  std::vector<RowRecord> records_;  // all rows, as they were before the bits were read
  bool rows_in_motion_ = false;
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
  records_.resize(ledger_format::kMaxRows);
  MVGPU_RETURN_IF_ERROR(
      ReadAt(ledger_format::kRowTable, records_.data(), records_.size() * sizeof(RowRecord)));
  for (unsigned i = 0; i < ledger_format::kMaxRows; ++i) {
    const RowRecord& record = records_[i];
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
    row.cache = {record.cached_pages,       record.idle_pages,           record.cache_hit_pages,
                 record.cache_miss_pages,   record.cache_unmapped_pages, record.cache_revoked_pages,
                 record.cache_evicted_pages};
    row_at_[i] = static_cast<int>(snapshot_.rows.size());
    snapshot_.rows.push_back(std::move(row));
  }
  return {};
}

// Bits that were seen set had been counted as held, and bits that were seen cleared as released,
// before they were changed. So the counters from before, when no change was under way, and those
// from after enclose what was seen.
Result<void> Reader::ReadBounds() {
  std::vector<RowRecord> now(ledger_format::kMaxRows);
  MVGPU_RETURN_IF_ERROR(
      ReadAt(ledger_format::kRowTable, now.data(), now.size() * sizeof(RowRecord)));
  for (LedgerSnapshot::Row& row : snapshot_.rows) {
    const RowRecord& before = records_[row.index];
    const RowRecord& after = now[row.index];
    if (before.changes == after.changes && before.changes % 2 == 0) {
      row.least_unique_pages = before.held_pages - before.released_pages;
      row.most_unique_pages = row.least_unique_pages;
      continue;
    }
    const bool is_at_rest = before.changes == after.changes && row.liveness == Liveness::kDead;
    rows_in_motion_ |= !is_at_rest;
    if (before.changes % 2 != 0 || before.token != after.token) continue;
    row.most_unique_pages = after.held_pages - before.released_pages;
    row.least_unique_pages = before.held_pages - std::min(before.held_pages, after.released_pages);
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
  if (record.payer_segment != 0) {
    MVGPU_ASSIGN_OR_RETURN(
        holders.payers, ReadSegment(record.payer_segment, ledger_format::kPayerSegment, index, 0));
  }
  Chunk chunk;
  holders.windows.resize(holders.rows.size());
  for (uint64_t i = 0; i < chunks; ++i) {
    if (i % kChunksAtOnce == 0) MVGPU_RETURN_IF_ERROR(ReadWindows(i, holders));
    MVGPU_RETURN_IF_ERROR(ReadChunk(i, holders, chunk));
    CountChunk(chunk);
  }
  return {};
}

Result<void> Reader::ReadWindows(uint64_t first, Holders& holders) const {
  for (size_t i = 0; i < holders.rows.size(); ++i) {
    const Segment& segment = holders.segments[i];
    std::vector<uint64_t>& window = holders.windows[i];
    for (uint64_t chunk = first; chunk < first + kChunksAtOnce;) {
      uint64_t count = 0;
      while (chunk + count < first + kChunksAtOnce && segment.present(chunk + count)) ++count;
      if (count != 0) {
        window.resize(kChunksAtOnce * ledger_format::kWordsPerChunk);
        MVGPU_RETURN_IF_ERROR(ReadAt(
            segment.data + chunk * kChunkBytes,
            window.data() + (chunk - first) * ledger_format::kWordsPerChunk, count * kChunkBytes));
      }
      chunk += count + 1;
    }
  }
  return {};
}

Result<void> Reader::ReadChunk(uint64_t index, const Holders& holders, Chunk& chunk) const {
  chunk.first_page = index * ledger_format::kPagesPerHoldChunk;
  chunk.rows.clear();
  chunk.words.clear();
  chunk.payer_bytes.clear();
  for (size_t i = 0; i < holders.rows.size(); ++i) {
    if (!holders.segments[i].present(index)) continue;
    chunk.rows.push_back(holders.rows[i]);
    chunk.words.push_back(holders.windows[i].data() +
                          index % kChunksAtOnce * ledger_format::kWordsPerChunk);
  }
  // With one holder there is nothing to name.
  if (chunk.rows.size() < 2 || !holders.payers) return {};
  return ReadPayerBytes(index, *holders.payers, chunk);
}

Result<void> Reader::ReadPayerBytes(uint64_t index, const Segment& payers, Chunk& chunk) const {
  constexpr uint64_t kPerChunk =
      ledger_format::kPagesPerHoldChunk / ledger_format::kPagesPerPayerChunk;
  for (uint64_t i = 0; i < kPerChunk; ++i) {
    if (!payers.present(index * kPerChunk + i)) continue;
    chunk.payer_bytes.resize(kPerChunk * kChunkBytes);
    MVGPU_RETURN_IF_ERROR(ReadAt(payers.data + (index * kPerChunk + i) * kChunkBytes,
                                 chunk.payer_bytes.data() + i * kChunkBytes, kChunkBytes));
  }
  return {};
}

void Reader::CountPagesOf(uint8_t row, uint64_t unique, uint64_t charged) {
  const int at = row_at_[row];
  if (at < 0) {
    snapshot_.files.back().pages_of_free_rows += unique;
    return;
  }
  snapshot_.rows[static_cast<size_t>(at)].unique_pages += unique;
  snapshot_.rows[static_cast<size_t>(at)].charged_pages += charged;
}

void Reader::CountChunk(const Chunk& chunk) {
  LedgerSnapshot::File& file = snapshot_.files.back();
  const bool is_within_file = chunk.first_page + ledger_format::kPagesPerHoldChunk <= file.pages;
  if (chunk.rows.size() == 1 && is_within_file) {
    const uint64_t pages = CountPages({chunk.words[0], ledger_format::kWordsPerChunk});
    file.unique_pages += pages;
    return CountPagesOf(chunk.rows[0], pages, pages);
  }
  if (chunk.rows.empty()) return;
  for (uint64_t word = 0; word < ledger_format::kWordsPerChunk; ++word) CountWord(chunk, word);
}

void Reader::CountWord(const Chunk& chunk, uint64_t word) {
  const auto count = static_cast<unsigned>(chunk.rows.size());
  uint64_t held[ledger_format::kMaxRows];
  uint64_t paid[ledger_format::kMaxRows];
  uint64_t any = 0;
  for (unsigned i = 0; i < count; ++i) {
    held[i] = chunk.words[i][word];
    any |= held[i];
  }
  if (any == 0) return;
  DividePages(chunk.rows.data(), held, count,
              chunk.payer_bytes.empty()
                  ? nullptr
                  : chunk.payer_bytes.data() + word * ledger_format::kPagesPerWord,
              paid);
  for (unsigned i = 0; i < count; ++i) {
    if (held[i] != 0) CountPagesOf(chunk.rows[i], CountPages(held[i]), CountPages(paid[i]));
  }
  LedgerSnapshot::File& file = snapshot_.files.back();
  file.unique_pages += CountPages(any);
  const uint64_t first = chunk.first_page + word * ledger_format::kPagesPerWord;
  if (first >= file.pages) {
    file.pages_beyond_end += CountPages(any);
  } else if (file.pages - first < ledger_format::kPagesPerWord) {
    file.pages_beyond_end += CountPages(any >> (file.pages - first));
  }
}

bool Reader::was_in_motion() const {
  if (header_.magic != ledger_format::kMagic) return false;
  LedgerHeader now = {};
  if (!ReadAt(0, &now, sizeof now)) return true;
  return rows_in_motion_ || header_.sequence % 2 != 0 || header_.sequence != now.sequence;
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
  MVGPU_RETURN_IF_ERROR(ReadBounds());
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
    if (row.unique_pages < row.least_unique_pages || row.unique_pages > row.most_unique_pages) {
      const std::string counted =
          row.least_unique_pages == row.most_unique_pages
              ? fmt::format("{}", row.least_unique_pages)
              : fmt::format("{} to {}", row.least_unique_pages, row.most_unique_pages);
      problems.push_back(fmt::format("row {} ({}) counts {} unique pages but holds {}", row.index,
                                     row.name, counted, row.unique_pages));
    }
  }
  if (snapshot.in_motion) return problems;  // rows and files were not read at one moment
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
    complain(file.pages_beyond_end, "pages are held beyond its end");
    complain(file.pages_of_free_rows, "pages are held by rows that nobody has");
  }
  return problems;
}

}  // namespace mvgpu::domain
