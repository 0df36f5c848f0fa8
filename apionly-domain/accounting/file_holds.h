#pragma once

#include <cstdint>

#include "apionly-domain/accounting/ledger_format.h"
#include "apionly-domain/accounting/ledger_memory.h"
#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"

namespace mvgpu::domain {

// Who holds which pages of one backing file, and who pays: the bits, the payer bytes and the
// counters that follow from them. Works on words of 64 pages; cost follows the words that a run
// touches.
//
// A short-lived view for one operation. REQUIRES: the ledger's lock is held as long as it lives.
class FileHolds {
 public:
  // REQUIRES: file < memory.file_count().
  FileHolds(LedgerMemory& memory, unsigned file) : memory_(memory), index_(file) { collect(); }
  FileHolds(const FileHolds&) = delete;
  FileHolds& operator=(const FileHolds&) = delete;

  // Makes room for row holding `pages`, so that hold() cannot fail. Changes no hold and no charge.
  // Errors: kLimit (no memory, ledger full), kCorrupt (the file's record leads nowhere), kSystem.
  Result<void> prepare(unsigned row, PageRun pages);
  // Pages that the row holds already stay as they are. REQUIRES: prepare(row, pages) succeeded.
  void hold(unsigned row, PageRun pages);
  // Pages that the row does not hold stay as they are.
  void release(unsigned row, PageRun pages);
  // Releases whatever the row holds and gives its segment's memory back.
  void drop(unsigned row);

  // After a crash: clears payer bytes that name a row which does not hold the page.
  void clear_stale_payers();
  // Adds what the bits say to the counters of rows and file.
  void count();

 private:
  // One row with a segment. The pointer is to the chunk that contains the current word, null if
  // absent.
  struct Holder {
    LedgerSegment segment;
    const uint64_t* words;
  };
  // The state of one word of 64 pages.
  struct Word {
    uint64_t index = 0;                      // within the file
    uint64_t wanted = 0;                     // the pages of it that the run covers
    uint8_t* payer_bytes = nullptr;          // of its 64 pages; null: none is named
    uint64_t held[ledger_format::kMaxRows];  // by holder, in the order of rows_
  };
  static constexpr unsigned kNone = ledger_format::kMaxRows;

  ledger_format::FileRecord& record() const { return memory_.file(index_); }
  // Looks up the segments of all rows that take part.
  void collect();
  unsigned position_of(unsigned row) const;
  Result<void> prepare_segment(unsigned row, PageRun pages);
  // Payer bytes where `row` would pay by default for what a higher row pays for now.
  Result<void> prepare_payers(unsigned row, PageRun pages);
  Result<void> make_payer_chunk(uint64_t page);
  // Calls visit(Word&) for each word of the run, in order. Stops at an error where visit returns a
  // Result.
  template <typename Visit>
  void for_each_word(PageRun pages, Visit visit);
  void move_to_chunk(uint64_t word);
  void release_word(unsigned me, Word& word);

  LedgerMemory& memory_;
  const unsigned index_;
  bool has_payers_ = false;
  LedgerSegment payers_;  // valid if has_payers_
  unsigned count_ = 0;
  uint8_t rows_[ledger_format::kMaxRows];  // ascending
  Holder holders_[ledger_format::kMaxRows];
};

}  // namespace mvgpu::domain
