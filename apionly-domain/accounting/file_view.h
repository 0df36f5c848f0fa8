#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "apionly-domain/accounting/ledger_format.h"
#include "apionly-domain/accounting/ledger_memory.h"

namespace mvgpu::domain {

// Where the bits of one row and of its neighbours are for one backing file: what a change needs to
// know without taking the lock. Right as long as the file's layout is the one that it had when this
// was looked up.
struct FileView {
  struct Neighbour {
    unsigned row = 0;
    LedgerSegment segment;
  };

  uint64_t layout = 0;             // FileRecord::layout then; 0: nothing was looked up
  uint64_t* layout_now = nullptr;  // in the mapping
  uint64_t pages = 0;              // FileRecord::pages
  LedgerSegment mine;
  LedgerSegment payers;               // without chunks where the file has none
  std::vector<Neighbour> neighbours;  // ascending, without ours

  // The words of one chunk: changes that follow each other mostly stay in it. A chunk that is there
  // stays as long as the layout does; one that a neighbour lacks may come at any time.
  struct Window {
    uint64_t chunk = UINT64_MAX;  // which; that value: none
    uint64_t* mine = nullptr;
    unsigned neighbours = 0;  // that have this chunk, ascending:
    const uint64_t* words[ledger_format::kMaxRows] = {};
    uint8_t rows[ledger_format::kMaxRows] = {};
  };
  Window window;

  // False where we do not have the chunk.
  bool move_window(uint64_t chunk) {
    if (window.chunk == chunk) return true;
    window.chunk = UINT64_MAX;
    window.mine = mine.words(chunk);
    if (window.mine == nullptr) return false;
    window.neighbours = 0;
    for (const Neighbour& neighbour : neighbours) {
      const uint64_t* words = neighbour.segment.words(chunk);
      if (words == nullptr) continue;
      window.words[window.neighbours] = words;
      window.rows[window.neighbours++] = static_cast<uint8_t>(neighbour.row);
    }
    // To be looked up again otherwise.
    if (window.neighbours == neighbours.size()) window.chunk = chunk;
    return true;
  }
  // The row's bits of this page will be needed soon.
  void prefetch(uint64_t page) const {
    if (page / 8 < mine.chunks * ledger_format::kChunkBytes) {
      __builtin_prefetch(mine.data + page / 8, /*rw=*/1);
    }
  }
  // Sequentially consistent: see Change. REQUIRES: layout != 0.
  bool is_current() const { return std::atomic_ref<uint64_t>(*layout_now).load() == layout; }
};

// Says to all processes, while it lives, that a row changes bits. What is read meanwhile is as new
// as the announcement. One at a time for each row.
class Change {
 public:
  // `count` is the process's own copy of row.changes.
  Change(ledger_format::RowRecord& row, uint64_t& count) : changes_(row.changes), count_(count) {
    // Sequentially consistent, as are the load of the layout behind it, and the store of the layout
    // and the load of `changes` in LedgerStore: either we see the new layout, or who made it sees
    // us and waits.
    changes_.exchange(++count_);
  }
  Change(const Change&) = delete;
  Change& operator=(const Change&) = delete;
  // Release: who sees the change finished sees what it did.
  ~Change() { changes_.store(++count_, std::memory_order_release); }

 private:
  std::atomic_ref<uint64_t> changes_;
  uint64_t& count_;
};

}  // namespace mvgpu::domain
