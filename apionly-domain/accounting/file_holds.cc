#include "apionly-domain/accounting/file_holds.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>

#include "apionly-domain/accounting/change_gate.h"
#include "apionly-domain/accounting/payer_rule.h"

namespace mvgpu::domain {

using ledger_format::FileRecord;
using ledger_format::kPagesPerHoldChunk;
using ledger_format::kPagesPerPayerChunk;
using ledger_format::kPagesPerWord;
using ledger_format::kWordsPerChunk;
using ledger_format::LoadWord;
using ledger_format::StoreWord;

namespace {

uint64_t WordAt(const LedgerSegment& segment, uint64_t word) {
  const uint64_t* words = segment.words(word / kWordsPerChunk);
  return words != nullptr ? LoadWord(words[word % kWordsPerChunk]) : 0;
}

}  // namespace

tl::unexpected<Error> FileHolds::Damaged() const {
  return Fail(ErrorCode::kCorrupt,
              fmt::format("{} is damaged: the segments of file {}", memory_.path(), index_));
}

void FileHolds::collect() {
  payers_ = memory_.payer_segment(index_).value_or(LedgerSegment());
  count_ = 0;
  for (uint64_t rows = record().holder_rows; rows != 0; rows &= rows - 1) {
    const auto row = static_cast<unsigned>(std::countr_zero(rows));
    if (const auto segment = memory_.hold_segment(index_, row)) {
      holders_[count_++] = {row, *segment};
    }
  }
}

const FileHolds::Holder* FileHolds::holder(unsigned row) const {
  for (unsigned i = 0; i < count_; ++i) {
    if (holders_[i].row == row) return &holders_[i];
  }
  return nullptr;
}

FileView FileHolds::view_of(unsigned row) const {
  FileView view;
  view.layout_now = &record().layout;
  view.layout = LoadWord(record().layout);
  view.pages = record().pages;
  view.payers = payers_;
  for (unsigned i = 0; i < count_; ++i) {
    if (holders_[i].row == row) {
      view.mine = holders_[i].segment;
    } else {
      view.neighbours.push_back({holders_[i].row, holders_[i].segment});
    }
  }
  return view;
}

Result<void> FileHolds::make_room(unsigned row, PageRun pages) {
  if (pages.count == 0) return {};
  const Holder* mine = holder(row);
  if (mine == nullptr || pages.end() > mine->segment.chunks * kPagesPerHoldChunk) {
    MVGPU_RETURN_IF_ERROR(make_segment(row, pages));
    mine = holder(row);
  }
  if (mine == nullptr) return Damaged();
  for (uint64_t chunk = pages.first / kPagesPerHoldChunk;
       chunk <= (pages.end() - 1) / kPagesPerHoldChunk; ++chunk) {
    MVGPU_RETURN_IF_ERROR(memory_.make_present(mine->segment, chunk));
  }
  return make_payers(row, pages);
}

// A new segment with what is in the old one, in its place.
Result<LedgerSegment> FileHolds::make_larger(uint32_t kind, unsigned row, uint64_t pages,
                                             const LedgerSegment& old) {
  MVGPU_ASSIGN_OR_RETURN(const uint64_t offset, memory_.add_segment(kind, index_, row, pages));
  const auto larger = memory_.segment(offset, kind, index_, row);
  if (!larger) return Damaged();
  StopChanges(memory_, index_);
  const bool unused = ChangesFinished(memory_);
  for (uint64_t chunk = 0; chunk < old.chunks; ++chunk) {
    if (!old.present(chunk)) continue;
    MVGPU_RETURN_IF_ERROR(memory_.make_present(*larger, chunk));
    for (uint64_t i = 0; i < kWordsPerChunk; ++i) {
      StoreWord(larger->words(chunk)[i], LoadWord(old.words(chunk)[i]));
    }
  }
  // One store: the row's bits are the old ones, or the same in new space.
  StoreWord(
      kind == ledger_format::kHoldSegment ? record().hold_segment[row] : record().payer_segment,
      offset);
  if (old.chunks != 0 && unused) memory_.discard(old);
  return *larger;
}

Result<void> FileHolds::make_segment(unsigned row, PageRun pages) {
  const LedgerSegment old = memory_.hold_segment(index_, row).value_or(LedgerSegment());
  if (pages.end() > old.chunks * kPagesPerHoldChunk) {
    MVGPU_RETURN_IF_ERROR(
        make_larger(ledger_format::kHoldSegment, row, std::max(record().pages, pages.end()), old));
  } else {
    StopChanges(memory_, index_);  // the others look us up
  }
  StoreWord(record().holder_rows, record().holder_rows | uint64_t{1} << row);
  collect();
  return {};
}

Result<void> FileHolds::make_payers(unsigned row, PageRun pages) {
  for (uint64_t word = pages.first / kPagesPerWord; word <= (pages.end() - 1) / kPagesPerWord;
       ++word) {
    uint64_t mine = 0;
    uint64_t lower = 0;
    uint64_t higher = 0;
    for (unsigned i = 0; i < count_; ++i) {
      uint64_t& held = holders_[i].row == row ? mine : holders_[i].row < row ? lower : higher;
      held |= WordAt(holders_[i].segment, word);
    }
    const uint64_t page = word * kPagesPerWord;
    if ((higher & ~lower & ~mine) != 0 && !payers_.present(page / kPagesPerPayerChunk)) {
      MVGPU_RETURN_IF_ERROR(make_payer_chunk(page));
    }
  }
  return {};
}

Result<void> FileHolds::make_payer_chunk(uint64_t page) {
  if (page >= payers_.chunks * kPagesPerPayerChunk) {
    MVGPU_ASSIGN_OR_RETURN(payers_, make_larger(ledger_format::kPayerSegment, 0,
                                                std::max(record().pages, page + 1), payers_));
  }
  return memory_.make_present(payers_, page / kPagesPerPayerChunk);
}

void FileHolds::drop(unsigned row) {
  StopChanges(memory_, index_);
  if (const Holder* mine = holder(row)) {
    for (uint64_t chunk = 0; chunk < mine->segment.chunks; ++chunk) {
      uint64_t* words = mine->segment.words(chunk);
      // Each store moves the charges of its pages on.
      for (uint64_t i = 0; words != nullptr && i < kWordsPerChunk; ++i) StoreWord(words[i], {});
    }
    if (ChangesFinished(memory_)) memory_.discard(mine->segment);
  }
  StoreWord(record().holder_rows, record().holder_rows & ~(uint64_t{1} << row));
  collect();
}

bool FileHolds::is_empty() const {
  for (unsigned i = 0; i < count_; ++i) {
    const LedgerSegment& segment = holders_[i].segment;
    for (uint64_t chunk = 0; chunk < segment.chunks; ++chunk) {
      const uint64_t* words = segment.words(chunk);
      for (uint64_t j = 0; words != nullptr && j < kWordsPerChunk; ++j) {
        if (LoadWord(words[j]) != 0) return false;
      }
    }
  }
  return true;
}

void FileHolds::reset() {
  for (unsigned i = 0; i < count_; ++i) memory_.discard(holders_[i].segment);
  StoreWord(record().holder_rows, uint64_t{0});
  collect();
}

uint64_t FileHolds::charged_pages(unsigned row) const {
  const Holder* mine = holder(row);
  uint64_t charged = 0;
  for (uint64_t chunk = 0; mine != nullptr && chunk < mine->segment.chunks; ++chunk) {
    if (mine->segment.present(chunk)) charged += charged_in_chunk(row, chunk);
  }
  return charged;
}

// REQUIRES: the row has this chunk.
uint64_t FileHolds::charged_in_chunk(unsigned row, uint64_t chunk) const {
  uint8_t rows[ledger_format::kMaxRows];
  const uint64_t* words[ledger_format::kMaxRows];
  unsigned count = 0;
  unsigned me = 0;
  for (unsigned i = 0; i < count_; ++i) {
    words[count] = holders_[i].segment.words(chunk);
    if (words[count] == nullptr) continue;
    if (holders_[i].row == row) me = count;
    rows[count++] = static_cast<uint8_t>(holders_[i].row);
  }
  std::array<uint64_t, kWordsPerChunk> charged;
  uint64_t held[ledger_format::kMaxRows];
  uint64_t paid[ledger_format::kMaxRows];
  uint64_t payers[8];
  for (uint64_t i = 0; i < kWordsPerChunk; ++i) {
    charged[i] = LoadWord(words[me][i]);
    if (count == 1 || charged[i] == 0) continue;
    for (unsigned j = 0; j < count; ++j) held[j] = LoadWord(words[j][i]);
    const bool named = load_payers(chunk * kWordsPerChunk + i, payers);
    DividePages(rows, held, count, named ? reinterpret_cast<const uint8_t*>(payers) : nullptr,
                paid);
    charged[i] = paid[me];
  }
  return CountPages(charged);
}

bool FileHolds::load_payers(uint64_t word, uint64_t (&bytes)[8]) const {
  const uint64_t page = word * kPagesPerWord;
  std::byte* chunk = payers_.chunk(page / kPagesPerPayerChunk);
  if (chunk == nullptr) return false;
  const auto* at = reinterpret_cast<const uint64_t*>(chunk + page % kPagesPerPayerChunk);
  for (unsigned octet = 0; octet < 8; ++octet) bytes[octet] = LoadWord(at[octet]);
  return true;
}

}  // namespace mvgpu::domain
