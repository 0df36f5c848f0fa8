#pragma once

#include <cstdint>
#include <memory>
#include <utility>

#include <absl/container/flat_hash_map.h>

#include "apionly-domain/accounting/ledger.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/domain.h"
#include "apionly-domain/pin/run_counter.h"

namespace mvgpu::domain {

// What a domain that holds all that it maps has in the VM's ledger: each page of a file once, at
// however many IOVAs it is mapped. With the figures beside it: the row's mapped and pinned pages
// count each IOVA, and so does the kernel; and with the list of where the pages are seen.
//
// Not thread-safe.
class MappedCharges {
 public:
  // Without a row nothing is held or said.
  explicit MappedCharges(std::unique_ptr<LedgerRow> row) : row_(std::move(row)) {}
  // REQUIRES: everything is released.
  ~MappedCharges();

  // Holds what the mapping shows and no other one did before. Errors: those of LedgerRow::hold();
  // nothing has changed then. REQUIRES: mapping.file.
  Result<void> hold(const Mapping& mapping);
  // REQUIRES: held before, as a whole or in any cut.
  void release(const Mapping& mapping);
  // What the kernel counts for the domain's mappings.
  void set_locked_pages(uint64_t pages);

 private:
  static PageRun FilePagesOf(const Mapping& mapping) {
    return {PagesIn(mapping.file_offset), mapping.pages()};
  }
  void Publish();

  const std::unique_ptr<LedgerRow> row_;
  absl::flat_hash_map<FileIdentity, RunCounter> held_;  // without files of which nothing is held
  uint64_t mapped_pages_ = 0;
};

}  // namespace mvgpu::domain
