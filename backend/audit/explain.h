#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "apionly-domain/accounting/ledger_lookup.h"
#include "apionly-domain/accounting/ledger_view.h"
#include "apionly-domain/base/error.h"
#include "backend/audit/ledger_options.h"
#include "backend/audit/report.h"

namespace mvgpu::backend {

// `mvgpu-audit explain`: what lies behind an address, who holds it, who pays.
struct ExplainOptions {
  LedgerOptions ledgers;
  std::string question;
  bool json = false;

  // Adds the verb. This must outlive the parsing.
  CLI::App* add_to(CLI::App& app);
};

// An address, or a page of a file.
struct PageQuestion {
  std::string text;  // as it was asked
  std::optional<Iova> iova;
  domain::FileIdentity file;  // without an IOVA
  uint64_t offset = 0;        // bytes; likewise
};
// "0x1000" or "4096" is an IOVA; "FILE:7" is page 7 of a file and "FILE:+28672" the byte there,
// where FILE is a path, or "DEVICE:INODE" as `show --json` has them. Errors: kInvalid, kSystem (the
// path cannot be looked at).
Result<PageQuestion> ParsePageQuestion(const std::string& text);

// What one VM's ledger answers.
struct PageAnswer {
  struct Holder {
    domain::LedgerSnapshot::Row row;
    // If the payer of the page left, with all that it holds. None for the payer itself.
    std::optional<uint64_t> charged_without_payer;
  };
  // Domains may see different pages at one address.
  struct Place {
    domain::FileIdentity file;
    uint64_t offset = 0;  // bytes
    std::vector<domain::RowMappingList::Entry> seen_by;
    domain::PageHolders page;
    std::vector<Holder> holders;
  };
  std::string vm_uuid;
  std::vector<Place> places;
  std::vector<domain::LedgerSnapshot::Row> rows;  // of the VM, all
  bool in_motion = false;
  // Whether any domain maps or holds something there.
  bool is_known() const;
};
// Errors: those of ReadLedger().
Result<PageAnswer> AskLedger(const std::string& runtime_dir, const std::string& vm_uuid,
                             const PageQuestion& question);

// For people: at most 100 columns, ends with a newline.
std::string RenderText(const PageAnswer& answer, const PageQuestion& question);

// {"question": str, "page_size": 4096, "vms": [{"vm": uuid, "known": bool, "in_motion": bool,
//   "unlisted_mappings": n, "places": [PLACE]}], "errors": [as show]}
//   PLACE   {"file": {"device": n, "inode": n}, "page": n, "offset": n,
//            "mappings": [{"row": n, "name": str, "first": "0x..", "last": "0x..",
//                          "access": "read|write|read-write"}],
//            "holders": [{"row": n, "name": str, "kind": str, "pid": n, "state": str, "pays": bool,
//                         "charged_pages": n, "charged_pages_without_payer": n or null}],
//            "payer": row or null, "next_payer": row or null}
nlohmann::json ToJson(const PageAnswer& answer);

// The exit code: kAuditOk, kAuditProblem (no domain maps or holds anything there), and the usual.
int Explain(const ExplainOptions& options);

}  // namespace mvgpu::backend
