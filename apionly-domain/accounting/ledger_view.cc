#include "apionly-domain/accounting/ledger_view.h"

#include <fcntl.h>
#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <optional>
#include <span>
#include <thread>
#include <utility>

#include "apionly-domain/accounting/ledger_format.h"
#include "apionly-domain/accounting/ledger_memory.h"
#include "apionly-domain/accounting/ledger_reader.h"
#include "apionly-domain/accounting/payer_rule.h"

namespace mvgpu::domain {

using ledger_format::FileRecord;
using ledger_format::kChunkBytes;
using ledger_format::RowRecord;

namespace {

constexpr int kAttempts = 5;
constexpr uint64_t kChunksAtOnce = 32;  // a system call costs as much as copying some 10 KiB
constexpr auto kPause = std::chrono::milliseconds(1);

// One attempt at a copy.
class Reader {
 public:
  Reader(int fd, const std::string& path, const std::string& vm_uuid,
         std::optional<unsigned> without_row)
      : file_(fd, path, vm_uuid), without_row_(without_row) {}

  Result<LedgerSnapshot> Read();
  // After Read(): whether somebody changed the ledger meanwhile. What was read may be off then, or
  // look broken.
  bool was_in_motion() const;

 private:
  using Segment = LedgerReader::Segment;
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

  Result<void> ReadRows();
  Result<void> ReadFile(unsigned index);
  // Chunks [first, first + kChunksAtOnce) of all segments.
  Result<void> ReadWindows(uint64_t first, Holders& holders) const;
  Result<void> ReadChunk(uint64_t index, const Holders& holders, Chunk& chunk) const;
  Result<void> ReadPayerBytes(uint64_t index, const Segment& payers, Chunk& chunk) const;
  void CountChunk(const Chunk& chunk);
  void CountWord(const Chunk& chunk, uint64_t word);
  void CountPagesOf(uint8_t row, uint64_t unique, uint64_t charged);
  // After the bits: what the counters allow.
  Result<void> ReadBounds();

  LedgerReader file_;
  const std::optional<unsigned> without_row_;
  LedgerSnapshot snapshot_;
  std::vector<RowRecord> records_;  // all rows, as they were before the bits were read
  bool rows_in_motion_ = false;
  int row_at_[ledger_format::kMaxRows];  // index into snapshot_.rows, -1: free
};

Result<void> Reader::ReadRows() {
  MVGPU_ASSIGN_OR_RETURN(records_, file_.ReadRows());
  for (unsigned i = 0; i < ledger_format::kMaxRows; ++i) {
    const RowRecord& record = records_[i];
    row_at_[i] = -1;
    if (record.state == ledger_format::kRowFree || i == without_row_) continue;
    LedgerSnapshot::Row row;
    row.index = i;
    row.name = PrintableText(record.name, sizeof record.name);
    row.pin_backend = PrintableText(record.pin_backend, sizeof record.pin_backend);
    row.kind = record.kind;
    row.owner = OwnerOf(record);
    row.is_registered = ledger_format::IsRegistered(record);
    row.unlisted_mappings = record.unlisted_mappings;
    row.liveness = LivenessOf(row.owner);
    row.granule_pages = record.granule_pages;
    row.mapped_pages = record.mapped_pages;
    row.pinned_pages = record.pinned_pages;
    row.locked_pages = record.locked_pages;
    row.locked_areas = record.locked_areas;
    row.area_budget = record.area_budget;
    row.cache = {.cached_pages = record.cached_pages,
                 .idle_pages = record.idle_pages,
                 .hit_pages = record.cache_hit_pages,
                 .miss_pages = record.cache_miss_pages,
                 .unmapped_pages = record.cache_unmapped_pages,
                 .revoked_pages = record.cache_revoked_pages,
                 .evicted_pages = record.cache_evicted_pages,
                 .map_calls = record.cache_map_calls,
                 .mapper_calls = record.cache_mapper_calls,
                 .revocations = record.cache_revocations,
                 .moved_pages = record.cache_moved_pages};
    row_at_[i] = static_cast<int>(snapshot_.rows.size());
    snapshot_.rows.push_back(std::move(row));
  }
  return {};
}

// Bits that were seen set had been counted as held, and bits that were seen cleared as released,
// before they were changed. So the counters from before, when no change was under way, and those
// from after enclose what was seen.
Result<void> Reader::ReadBounds() {
  MVGPU_ASSIGN_OR_RETURN(const std::vector<RowRecord> now, file_.ReadRows());
  for (LedgerSnapshot::Row& row : snapshot_.rows) {
    const RowRecord& before = records_[row.index];
    const RowRecord& after = now[row.index];
    // Without a token it is being dropped, maybe by one that died of it: its bits go uncounted.
    if (before.token == 0 || before.token != after.token) {
      rows_in_motion_ = true;
      continue;
    }
    if (before.changes == after.changes && before.changes % 2 == 0) {
      row.least_unique_pages = before.held_pages - before.released_pages;
      row.most_unique_pages = row.least_unique_pages;
      continue;
    }
    const bool is_at_rest = before.changes == after.changes && row.liveness == Liveness::kDead;
    rows_in_motion_ |= !is_at_rest;
    if (before.changes % 2 != 0) continue;
    row.most_unique_pages = after.held_pages - before.released_pages;
    row.least_unique_pages = before.held_pages - std::min(before.held_pages, after.released_pages);
  }
  return {};
}

Result<void> Reader::ReadFile(unsigned index) {
  MVGPU_ASSIGN_OR_RETURN(const std::optional<FileRecord> found, file_.ReadFileRecord(index));
  if (!found) return {};
  const FileRecord& record = *found;
  snapshot_.files.push_back({{record.device, record.inode}, record.pages});
  Holders holders;
  uint64_t chunks = 0;
  for (uint64_t rows = record.holder_rows; rows != 0; rows &= rows - 1) {
    const auto row = static_cast<unsigned>(std::countr_zero(rows));
    MVGPU_ASSIGN_OR_RETURN(
        Segment segment,
        file_.ReadSegment(record.hold_segment[row], ledger_format::kHoldSegment, index, row));
    if (row == without_row_) continue;
    chunks = std::max(chunks, segment.chunks());
    holders.rows.push_back(static_cast<uint8_t>(row));
    holders.segments.push_back(std::move(segment));
  }
  if (record.payer_segment != 0) {
    MVGPU_ASSIGN_OR_RETURN(
        holders.payers,
        file_.ReadSegment(record.payer_segment, ledger_format::kPayerSegment, index, 0));
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
        MVGPU_RETURN_IF_ERROR(file_.ReadAt(
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
    MVGPU_RETURN_IF_ERROR(file_.ReadAt(payers.data + (index * kPerChunk + i) * kChunkBytes,
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
  return file_.header().magic == ledger_format::kMagic && (rows_in_motion_ || file_.was_locked());
}

Result<LedgerSnapshot> Reader::Read() {
  MVGPU_RETURN_IF_ERROR(file_.ReadHeader());
  snapshot_.path = file_.path();
  snapshot_.vm_uuid = file_.vm_uuid();
  snapshot_.repairs = file_.header().repairs;
  MVGPU_RETURN_IF_ERROR(ReadRows());
  for (unsigned i = 0; i < file_.header().file_count; ++i) MVGPU_RETURN_IF_ERROR(ReadFile(i));
  for (const LedgerSnapshot::File& file : snapshot_.files)
    snapshot_.unique_pages += file.unique_pages;
  MVGPU_RETURN_IF_ERROR(ReadBounds());
  snapshot_.in_motion = was_in_motion();
  return std::move(snapshot_);
}

Result<LedgerSnapshot> ReadRepeatedly(int fd, const std::string& path, const std::string& vm_uuid,
                                      bool must_be_quiet,
                                      std::optional<unsigned> without_row = std::nullopt) {
  for (int attempt = 1;; ++attempt) {
    Reader reader(fd, path, vm_uuid, without_row);
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

Result<LedgerSnapshot> ReadLedgerWithout(int fd, const std::string& path,
                                         const std::string& vm_uuid, unsigned row) {
  return ReadRepeatedly(fd, path, vm_uuid, /*must_be_quiet=*/true, row);
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
