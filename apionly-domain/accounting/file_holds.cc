#include "apionly-domain/accounting/file_holds.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "apionly-domain/accounting/payer_rule.h"

namespace mvgpu::domain {

using ledger_format::FileRecord;
using ledger_format::kPagesPerHoldChunk;
using ledger_format::kPagesPerPayerChunk;
using ledger_format::kPagesPerWord;
using ledger_format::kWordsPerChunk;

namespace {

void Add(uint64_t& counter, uint64_t pages) {
  ledger_format::StoreCounter(counter, ledger_format::LoadCounter(counter) + pages);
}
void Subtract(uint64_t& counter, uint64_t pages) {
  ledger_format::StoreCounter(counter, ledger_format::LoadCounter(counter) - pages);
}

// Bits [first, first + count) of a word. REQUIRES: first + count <= 64, count > 0.
uint64_t BitRange(uint64_t first, uint64_t count) {
  return (count == 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1) << first;
}

}  // namespace

void FileHolds::collect() {
  const FileRecord& file = record();
  const auto payers = memory_.segment(file.payer_segment, ledger_format::kPayerSegment);
  has_payers_ = payers.has_value();
  if (has_payers_) payers_ = *payers;
  count_ = 0;
  for (uint64_t rows = file.holder_rows; rows != 0; rows &= rows - 1) {
    const auto row = static_cast<unsigned>(std::countr_zero(rows));
    if (const auto segment = memory_.segment(file.hold_segment[row], ledger_format::kHoldSegment)) {
      rows_[count_] = static_cast<uint8_t>(row);
      holders_[count_] = {*segment, nullptr};
      ++count_;
    }
  }
}

unsigned FileHolds::position_of(unsigned row) const {
  for (unsigned i = 0; i < count_; ++i) {
    if (rows_[i] == row) return i;
  }
  return kNone;
}

void FileHolds::move_to_chunk(uint64_t word) {
  for (unsigned i = 0; i < count_; ++i) {
    holders_[i].words =
        reinterpret_cast<const uint64_t*>(holders_[i].segment.chunk(word / kWordsPerChunk));
  }
}

template <typename Visit>
void FileHolds::for_each_word(PageRun pages, Visit visit) {
  if (pages.count == 0) return;
  Word word;
  for (uint64_t page = pages.first; page < pages.end();) {
    word.index = page / kPagesPerWord;
    if (page == pages.first || word.index % kWordsPerChunk == 0) move_to_chunk(word.index);
    const uint64_t in_word = page % kPagesPerWord;
    const uint64_t covered = std::min(kPagesPerWord - in_word, pages.end() - page);
    word.wanted = BitRange(in_word, covered);
    for (unsigned i = 0; i < count_; ++i) {
      word.held[i] =
          holders_[i].words != nullptr ? holders_[i].words[word.index % kWordsPerChunk] : 0;
    }
    word.payer_bytes = nullptr;
    if (has_payers_) {
      const uint64_t first = word.index * kPagesPerWord;
      std::byte* chunk = payers_.chunk(first / kPagesPerPayerChunk);
      if (chunk != nullptr) {
        word.payer_bytes = reinterpret_cast<uint8_t*>(chunk) + first % kPagesPerPayerChunk;
      }
    }
    visit(word);
    page += covered;
  }
}

Result<void> FileHolds::prepare(unsigned row, PageRun pages) {
  if (pages.count == 0) return {};
  MVGPU_RETURN_IF_ERROR(prepare_segment(row, pages));
  return prepare_payers(row, pages);
}

Result<void> FileHolds::prepare_segment(unsigned row, PageRun pages) {
  FileRecord& file = record();
  const uint64_t bit = uint64_t{1} << row;
  std::optional<LedgerSegment> mine =
      memory_.segment(file.hold_segment[row], ledger_format::kHoldSegment);
  if (!mine || pages.end() > mine->chunks * kPagesPerHoldChunk) {
    MVGPU_ASSIGN_OR_RETURN(const uint64_t offset,
                           memory_.add_segment(ledger_format::kHoldSegment, index_, row,
                                               std::max(file.pages, pages.end())));
    const auto larger = memory_.segment(offset, ledger_format::kHoldSegment);
    if (!larger) return Fail(ErrorCode::kCorrupt, fmt::format("{} is damaged", memory_.path()));
    for (uint64_t chunk = 0; mine && chunk < mine->chunks; ++chunk) {
      if (!mine->present(chunk)) continue;
      MVGPU_RETURN_IF_ERROR(memory_.make_present(*larger, chunk));
      std::memcpy(larger->chunk(chunk), mine->chunk(chunk), ledger_format::kChunkBytes);
    }
    file.hold_segment[row] =
        offset;  // one store: the row's bits are the old ones or the same in new space
    if (mine) memory_.discard(*mine);
    mine = larger;
  }
  for (uint64_t chunk = pages.first / kPagesPerHoldChunk;
       chunk <= (pages.end() - 1) / kPagesPerHoldChunk; ++chunk) {
    MVGPU_RETURN_IF_ERROR(memory_.make_present(*mine, chunk));
  }
  file.holder_rows |= bit;
  collect();
  return {};
}

Result<void> FileHolds::prepare_payers(unsigned row, PageRun pages) {
  const unsigned me = position_of(row);
  if (me == kNone) return Fail(ErrorCode::kCorrupt, fmt::format("{} is damaged", memory_.path()));
  if (me + 1 == count_) return {};  // no higher row: the default is right
  Result<void> outcome;
  for_each_word(pages, [&](Word& word) {
    uint64_t lower = 0;
    uint64_t higher = 0;
    for (unsigned i = 0; i < me; ++i) lower |= word.held[i];
    for (unsigned i = me + 1; i < count_; ++i) higher |= word.held[i];
    const uint64_t at_risk = word.wanted & ~word.held[me] & higher & ~lower;
    if (at_risk != 0 && word.payer_bytes == nullptr && outcome) {
      outcome = make_payer_chunk(word.index * kPagesPerWord);
    }
  });
  return outcome;
}

Result<void> FileHolds::make_payer_chunk(uint64_t page) {
  if (!has_payers_ || page >= payers_.chunks * kPagesPerPayerChunk) {
    MVGPU_ASSIGN_OR_RETURN(const uint64_t offset,
                           memory_.add_segment(ledger_format::kPayerSegment, index_, 0,
                                               std::max(record().pages, page + 1)));
    const auto larger = memory_.segment(offset, ledger_format::kPayerSegment);
    if (!larger) return Fail(ErrorCode::kCorrupt, fmt::format("{} is damaged", memory_.path()));
    for (uint64_t chunk = 0; has_payers_ && chunk < payers_.chunks; ++chunk) {
      if (!payers_.present(chunk)) continue;
      MVGPU_RETURN_IF_ERROR(memory_.make_present(*larger, chunk));
      std::memcpy(larger->chunk(chunk), payers_.chunk(chunk), ledger_format::kChunkBytes);
    }
    record().payer_segment = offset;
    if (has_payers_) memory_.discard(payers_);
    payers_ = *larger;
    has_payers_ = true;
  }
  return memory_.make_present(payers_, page / kPagesPerPayerChunk);
}

void FileHolds::hold(unsigned row, PageRun pages) {
  const unsigned me = position_of(row);
  if (me == kNone) return;
  uint64_t taken = 0;
  uint64_t charged = 0;
  uint64_t before[ledger_format::kMaxRows];
  uint64_t after[ledger_format::kMaxRows];
  for_each_word(pages, [&](Word& word) {
    const uint64_t fresh = word.wanted & ~word.held[me];
    uint64_t others = 0;
    for (unsigned i = 0; i < count_; ++i) others |= i == me ? 0 : word.held[i];
    if ((fresh & others) != 0) {
      DividePages(rows_, word.held, count_, word.payer_bytes, before);
      word.held[me] |= fresh;
      DividePages(rows_, word.held, count_, word.payer_bytes, after);
      // Named before our bit is set, the payer stays the same through both stores.
      for (uint64_t moved = after[me] & fresh & others; moved != 0; moved &= moved - 1) {
        const auto page = static_cast<unsigned>(std::countr_zero(moved));
        for (unsigned i = 0; i < count_ && word.payer_bytes != nullptr; ++i) {
          if ((before[i] >> page & 1) != 0) {
            word.payer_bytes[page] = static_cast<uint8_t>(rows_[i] + 1);
          }
        }
      }
    }
    const_cast<uint64_t*>(holders_[me].words)[word.index % kWordsPerChunk] |= fresh;
    taken += CountPages(fresh);
    charged += CountPages(fresh & ~others);
  });
  Add(memory_.row(row).unique_pages, taken);
  Add(memory_.row(row).charged_pages, charged);
  Add(record().held_pages, taken);
}

void FileHolds::release_word(unsigned me, Word& word) {
  const uint64_t gone = word.wanted & word.held[me];
  if (gone == 0) return;
  uint64_t before[ledger_format::kMaxRows];
  uint64_t after[ledger_format::kMaxRows];
  DividePages(rows_, word.held, count_, word.payer_bytes, before);
  word.held[me] &= ~gone;
  DividePages(rows_, word.held, count_, word.payer_bytes, after);
  if (word.payer_bytes != nullptr) {
    for (uint64_t left = gone; left != 0; left &= left - 1) {
      uint8_t& payer = word.payer_bytes[std::countr_zero(left)];
      if (payer == rows_[me] + 1) payer = 0;
    }
  }
  const_cast<uint64_t*>(holders_[me].words)[word.index % kWordsPerChunk] = word.held[me];
  for (unsigned i = 0; i < count_; ++i) {
    const uint64_t gained = CountPages(after[i] & ~before[i]);
    if (gained != 0) Add(memory_.row(rows_[i]).charged_pages, gained);
  }
  Subtract(memory_.row(rows_[me]).charged_pages, CountPages(before[me] & gone));
  Subtract(memory_.row(rows_[me]).unique_pages, CountPages(gone));
  Subtract(record().held_pages, CountPages(gone));
}

void FileHolds::release(unsigned row, PageRun pages) {
  const unsigned me = position_of(row);
  if (me == kNone) return;
  for_each_word(pages, [&](Word& word) { release_word(me, word); });
}

void FileHolds::drop(unsigned row) {
  const unsigned me = position_of(row);
  if (me != kNone) {
    const LedgerSegment mine = holders_[me].segment;
    for (uint64_t chunk = 0; chunk < mine.chunks; ++chunk) {
      if (mine.present(chunk)) release(row, {chunk * kPagesPerHoldChunk, kPagesPerHoldChunk});
    }
    memory_.discard(mine);
  }
  record().holder_rows &= ~(uint64_t{1} << row);
  collect();
}

void FileHolds::clear_stale_payers() {
  if (!has_payers_) return;
  for (uint64_t chunk = 0; chunk < payers_.chunks; ++chunk) {
    if (!payers_.present(chunk)) continue;
    for_each_word({chunk * kPagesPerPayerChunk, kPagesPerPayerChunk}, [&](Word& word) {
      for (unsigned page = 0; page < kPagesPerWord; ++page) {
        uint8_t& payer = word.payer_bytes[page];
        if (payer == 0) continue;
        const unsigned position = position_of(payer - 1u);
        if (position == kNone || (word.held[position] >> page & 1) == 0) payer = 0;
      }
    });
  }
}

void FileHolds::count() {
  uint64_t paid[ledger_format::kMaxRows];
  uint64_t chunks = 0;
  for (unsigned i = 0; i < count_; ++i) chunks = std::max(chunks, holders_[i].segment.chunks);
  for (uint64_t chunk = 0; chunk < chunks; ++chunk) {
    bool any = false;
    for (unsigned i = 0; i < count_; ++i) any |= holders_[i].segment.present(chunk);
    if (!any) continue;
    for_each_word({chunk * kPagesPerHoldChunk, kPagesPerHoldChunk}, [&](Word& word) {
      DividePages(rows_, word.held, count_, word.payer_bytes, paid);
      for (unsigned i = 0; i < count_; ++i) {
        if (word.held[i] == 0) continue;
        Add(memory_.row(rows_[i]).unique_pages, CountPages(word.held[i]));
        Add(memory_.row(rows_[i]).charged_pages, CountPages(paid[i]));
        Add(record().held_pages, CountPages(word.held[i]));
      }
    });
  }
}

}  // namespace mvgpu::domain
