#pragma once

#include <absl/container/btree_map.h>

#include <cstdint>
#include <vector>

#include "apionly-domain/accounting/ledger.h"
#include "apionly-domain/accounting/ledger_memory.h"
#include "apionly-domain/accounting/ledger_store.h"

namespace mvgpu::domain {

// The list of a row's mappings in the ledger (ledger_format.h, "Where pages are seen"), and this
// process's memory of what it wrote there: that alone decides what is written next. An entry is a
// few stores; the ledger's lock is taken for the first one of each 64 places.
//
// Not thread-safe: one call at a time, beside whatever RowHolds of the same row does.
class RowMappings {
 public:
  // The store must outlive this. REQUIRES: the row was just added.
  RowMappings(LedgerStore& store, LedgerStore::RowId id)
      : store_(store), id_(id), record_(store.row(id.index)) {}
  RowMappings(const RowMappings&) = delete;
  RowMappings& operator=(const RowMappings&) = delete;

  // As LedgerRow::list_mapping() and unlist_mapping().
  void add(const LedgerMapping& mapping);
  void remove(IovaRange part);

 private:
  class Edit;
  static constexpr uint32_t kNowhere = UINT32_MAX;  // there was no room
  struct Listed {
    LedgerMapping mapping;
    uint32_t place;
  };

  // REQUIRES of all three: an Edit is under way.
  void Put(const LedgerMapping& mapping);
  void Clear(uint32_t place);
  // Null: there is no room.
  ledger_format::MappingEntry* EntryAt(uint32_t place);
  uint32_t FreePlace();
  void CountUnlisted(int difference);

  LedgerStore& store_;
  const LedgerStore::RowId id_;
  ledger_format::RowRecord& record_;
  LedgerSegment segment_;
  absl::btree_map<uint64_t, Listed> listed_;  // by first IOVA; disjoint
  std::vector<uint32_t> free_;                // places that were used before
  uint32_t next_place_ = 0;                   // from here on none was used
  uint32_t unlisted_ = 0;
};

}  // namespace mvgpu::domain
