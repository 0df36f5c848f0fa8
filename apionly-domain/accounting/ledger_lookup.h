#pragma once

// Questions about single pages and addresses, for people who have one and want to know who holds
// it. Like ledger_view.h, on which it leans: read-only, without a lock, trusting nothing in the
// file. Errors of all: as ReadLedgerFile().

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "apionly-domain/accounting/ledger.h"
#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/memory/guest_file.h"

namespace mvgpu::domain {

// Who holds one page of a file.
struct PageHolders {
  uint64_t file_pages = 0;     // as the ledger knows the file; 0: it does not
  std::vector<unsigned> rows;  // ascending
  std::optional<unsigned> payer;
  std::optional<unsigned> next_payer;  // when the payer lets go
  bool in_motion = false;
};
Result<PageHolders> ReadPageHolders(int fd, const std::string& path, const std::string& vm_uuid,
                                    const FileIdentity& file, uint64_t page);

// What the rows say about where they see pages. A row may have listed fewer mappings than it has:
// see LedgerSnapshot::Row::unlisted_mappings.
struct RowMappingList {
  struct Entry {
    unsigned row = 0;
    LedgerMapping mapping;
  };
  std::vector<Entry> entries;  // by row
  bool in_motion = false;
};
// The mappings around one address, at most one of each row; or all of them.
Result<RowMappingList> ReadMappings(int fd, const std::string& path, const std::string& vm_uuid,
                                    std::optional<Iova> around);

}  // namespace mvgpu::domain
