#pragma once

#include <cstdint>

#include "apionly-domain/accounting/file_view.h"
#include "apionly-domain/accounting/ledger_format.h"
#include "apionly-domain/accounting/ledger_memory.h"
#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"

namespace mvgpu::domain {

// The segments of one backing file: room for bits and payer bytes, and what is done to all bits of
// a row. Rows go on to hold and release meanwhile (row_holds.h), so all but make_room() and drop()
// of a row's own bits is a picture of things in motion.
//
// A short-lived view for one operation. REQUIRES: the ledger's lock is held as long as it lives.
class FileHolds {
 public:
  // REQUIRES: file < memory.file_count().
  FileHolds(LedgerMemory& memory, unsigned file) : memory_(memory), index_(file) { collect(); }
  FileHolds(const FileHolds&) = delete;
  FileHolds& operator=(const FileHolds&) = delete;

  // Makes room for row holding `pages`. Changes no hold and no charge. Errors: kLimit (no memory,
  // ledger full), kCorrupt (the file's record leads nowhere), kSystem.
  Result<void> make_room(unsigned row, PageRun pages);
  FileView view_of(unsigned row) const;

  // Clears all bits of the row and gives their memory back.
  void drop(unsigned row);
  // How many pages of this file the row pays for.
  uint64_t charged_pages(unsigned row) const;
  // Whether no row holds any page. Exact if changes are stopped and finished.
  bool is_empty() const;
  // Drops the empty segments of all rows. REQUIRES: is_empty(); changes are stopped and finished.
  void reset();

 private:
  struct Holder {
    unsigned row;
    LedgerSegment segment;
  };

  ledger_format::FileRecord& record() const { return memory_.file(index_); }
  // Looks up the segments of all rows that take part.
  void collect();
  // Null where the row takes no part.
  const Holder* holder(unsigned row) const;
  Result<void> make_segment(unsigned row, PageRun pages);
  // Payer bytes where `row` would pay by default for what a higher row pays for now.
  Result<void> make_payers(unsigned row, PageRun pages);
  Result<void> make_payer_chunk(uint64_t page);
  uint64_t charged_in_chunk(unsigned row, uint64_t chunk) const;
  // The payer bytes of a word's 64 pages; false where none is named.
  bool load_payers(uint64_t word, uint64_t (&bytes)[8]) const;
  Result<LedgerSegment> make_larger(uint32_t kind, unsigned row, uint64_t pages,
                                    const LedgerSegment& old);
  tl::unexpected<Error> Damaged() const;

  LedgerMemory& memory_;
  const unsigned index_;
  LedgerSegment payers_;  // without chunks where there are none
  unsigned count_ = 0;
  Holder holders_[ledger_format::kMaxRows];  // ascending
};

}  // namespace mvgpu::domain
