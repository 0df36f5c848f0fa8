#include "apionly-domain/accounting/ledger_lookup.h"

#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <thread>
#include <utility>

#include "apionly-domain/accounting/ledger_memory.h"
#include "apionly-domain/accounting/ledger_reader.h"
#include "apionly-domain/accounting/payer_rule.h"

namespace mvgpu::domain {

using ledger_format::FileRecord;
using ledger_format::kMappingsPerChunk;
using ledger_format::kPagesPerHoldChunk;
using ledger_format::kPagesPerPayerChunk;
using ledger_format::kPagesPerWord;
using ledger_format::MappingEntry;
using ledger_format::RowRecord;

namespace {

constexpr int kAttempts = 5;
constexpr auto kPause = std::chrono::milliseconds(1);

// Whether what was read between the two belongs to one moment. Rows of the dead do not move.
bool InMotion(const std::vector<RowRecord>& before, const std::vector<RowRecord>& after) {
  for (size_t i = 0; i < before.size(); ++i) {
    const RowRecord& a = before[i];
    const RowRecord& b = after[i];
    if (a.token != b.token || a.changes != b.changes || a.mapping_sequence != b.mapping_sequence) {
      return true;
    }
    if (a.state == ledger_format::kRowFree || (a.changes | a.mapping_sequence) % 2 == 0) continue;
    if (LivenessOf(OwnerOf(a)) != Liveness::kDead) return true;
  }
  return false;
}

// Reads with `read`, a Result<Answer>(LedgerReader&, const std::vector<RowRecord>&), until nobody
// changed anything meanwhile; the last time, whatever was found.
template <typename Answer, typename Read>
Result<Answer> ReadAtRest(int fd, const std::string& path, const std::string& vm_uuid,
                          const Read& read) {
  for (int attempt = 1;; ++attempt) {
    LedgerReader file(fd, path, vm_uuid);
    MVGPU_RETURN_IF_ERROR(file.ReadHeader());
    MVGPU_ASSIGN_OR_RETURN(const std::vector<RowRecord> before, file.ReadRows());
    Result<Answer> answer = read(file, before);
    MVGPU_ASSIGN_OR_RETURN(const std::vector<RowRecord> after, file.ReadRows());
    const bool in_motion = file.was_locked() || InMotion(before, after);
    if (answer) answer->in_motion = in_motion;
    if (!in_motion || attempt == kAttempts) return answer;
    std::this_thread::sleep_for(kPause);
  }
}

Result<std::optional<std::pair<unsigned, FileRecord>>> FindFile(const LedgerReader& file,
                                                                const FileIdentity& identity) {
  for (unsigned i = 0; i < file.header().file_count; ++i) {
    MVGPU_ASSIGN_OR_RETURN(const std::optional<FileRecord> record, file.ReadFileRecord(i));
    if (record && record->device == identity.device && record->inode == identity.inode) {
      return std::pair(i, *record);
    }
  }
  return std::nullopt;
}

// One word of 64 pages: who holds what of it, and the payer bytes.
struct SharedWord {
  std::vector<uint8_t> rows;
  std::vector<uint64_t> held;
  std::array<uint8_t, kPagesPerWord> payer_bytes = {};

  // Who pays for the page if `left` (a row, or -1) holds nothing.
  std::optional<unsigned> payer_of(uint64_t page, int left) const {
    std::vector<uint64_t> others = held;
    std::vector<uint64_t> paid(held.size());
    for (size_t i = 0; i < rows.size(); ++i) {
      if (rows[i] == left) others[i] = 0;
    }
    DividePages(rows.data(), others.data(), static_cast<unsigned>(rows.size()), payer_bytes.data(),
                paid.data());
    for (size_t i = 0; i < rows.size(); ++i) {
      if ((paid[i] >> (page % kPagesPerWord) & 1) != 0) return rows[i];
    }
    return std::nullopt;
  }
};

Result<SharedWord> ReadWord(LedgerReader& file, unsigned index, const FileRecord& record,
                            uint64_t page) {
  SharedWord word;
  const uint64_t first = page / kPagesPerWord * kPagesPerWord;
  for (uint64_t rows = record.holder_rows; rows != 0; rows &= rows - 1) {
    const auto row = static_cast<unsigned>(std::countr_zero(rows));
    MVGPU_ASSIGN_OR_RETURN(
        const LedgerReader::Segment segment,
        file.ReadSegment(record.hold_segment[row], ledger_format::kHoldSegment, index, row));
    if (!segment.present(page / kPagesPerHoldChunk)) continue;
    uint64_t held = 0;
    MVGPU_RETURN_IF_ERROR(file.ReadAt(segment.data + first / 8, &held, sizeof held));
    word.rows.push_back(static_cast<uint8_t>(row));
    word.held.push_back(held);
  }
  if (record.payer_segment == 0) return word;
  MVGPU_ASSIGN_OR_RETURN(
      const LedgerReader::Segment payers,
      file.ReadSegment(record.payer_segment, ledger_format::kPayerSegment, index, 0));
  if (payers.present(page / kPagesPerPayerChunk)) {
    MVGPU_RETURN_IF_ERROR(
        file.ReadAt(payers.data + first, word.payer_bytes.data(), word.payer_bytes.size()));
  }
  return word;
}

Result<PageHolders> HoldersOf(LedgerReader& file, const FileIdentity& identity, uint64_t page) {
  PageHolders holders;
  MVGPU_ASSIGN_OR_RETURN(const auto found, FindFile(file, identity));
  if (!found) return holders;
  holders.file_pages = found->second.pages;
  MVGPU_ASSIGN_OR_RETURN(const SharedWord word, ReadWord(file, found->first, found->second, page));
  for (size_t i = 0; i < word.rows.size(); ++i) {
    if ((word.held[i] >> (page % kPagesPerWord) & 1) != 0) holders.rows.push_back(word.rows[i]);
  }
  holders.payer = word.payer_of(page, -1);
  if (holders.payer) holders.next_payer = word.payer_of(page, static_cast<int>(*holders.payer));
  return holders;
}

std::optional<LedgerMapping> MappingOf(const MappingEntry& entry, uint64_t token) {
  const auto range = IovaRange::FromStartAndSize(Iova(entry.iova), entry.bytes);
  if (entry.token != token || !range || entry.access < 1 || entry.access > 3 ||
      !CheckedAdd(entry.file_offset, entry.bytes)) {
    return std::nullopt;
  }
  return LedgerMapping{
      *range, static_cast<Access>(entry.access), {entry.device, entry.inode}, entry.file_offset};
}

Result<void> AddMappingsOf(LedgerReader& file, unsigned row, const RowRecord& record,
                           std::optional<Iova> around, std::vector<RowMappingList::Entry>& found) {
  if (record.state == ledger_format::kRowFree || record.mapping_segment == 0) return {};
  MVGPU_ASSIGN_OR_RETURN(
      const LedgerReader::Segment segment,
      file.ReadSegment(record.mapping_segment, ledger_format::kMappingSegment, 0, row));
  std::array<MappingEntry, kMappingsPerChunk> entries;
  for (uint64_t chunk = 0; chunk < segment.chunks(); ++chunk) {
    if (!segment.present(chunk)) continue;
    MVGPU_RETURN_IF_ERROR(file.ReadAt(segment.data + chunk * ledger_format::kChunkBytes,
                                      entries.data(), sizeof entries));
    for (const MappingEntry& entry : entries) {
      const auto mapping = MappingOf(entry, record.token);
      if (!mapping || (around && !mapping->iova.contains(*around))) continue;
      found.push_back({row, *mapping});
      if (around) return {};  // a row's mappings are disjoint
    }
  }
  return {};
}

}  // namespace

Result<PageHolders> ReadPageHolders(int fd, const std::string& path, const std::string& vm_uuid,
                                    const FileIdentity& file, uint64_t page) {
  return ReadAtRest<PageHolders>(fd, path, vm_uuid,
                                 [&](LedgerReader& reader, const std::vector<RowRecord>&) {
                                   return HoldersOf(reader, file, page);
                                 });
}

Result<RowMappingList> ReadMappings(int fd, const std::string& path, const std::string& vm_uuid,
                                    std::optional<Iova> around) {
  return ReadAtRest<RowMappingList>(
      fd, path, vm_uuid,
      [&](LedgerReader& reader, const std::vector<RowRecord>& rows) -> Result<RowMappingList> {
        RowMappingList list;
        for (unsigned i = 0; i < rows.size(); ++i) {
          MVGPU_RETURN_IF_ERROR(AddMappingsOf(reader, i, rows[i], around, list.entries));
        }
        return list;
      });
}

}  // namespace mvgpu::domain
