#pragma once

#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "backend/audit/ledger_options.h"
#include "backend/audit/report.h"

namespace mvgpu::backend {

// `mvgpu-audit repair`: drops what the dead left in ledgers, as the next domain that joins would
// do, and removes ledgers that nobody uses when it is asked to.
struct RepairOptions {
  LedgerOptions ledgers;
  bool remove = false;
  bool json = false;

  // Adds the verb. This must outlive the parsing.
  CLI::App* add_to(CLI::App& app);
};

// Something that was done to the ledger of a VM, or that was not.
struct RepairStep {
  enum class Kind {
    kDroppedRow,   // of a dead process
    kChargeMoved,  // what a domain that is left pays for now in its place
    kRemoved,      // the ledger
    kRefused,      // to remove it
  };
  Kind kind;
  std::string vm_uuid;
  std::optional<domain::LedgerSnapshot::Row> row;  // as it was; of the first two
  uint64_t moved_pages = 0;                        // kChargeMoved
  std::string message;                             // one line
};

// {"runtime_dir": str, "actions": [ACTION], "errors": [as show]}
//   ACTION  {"vm": uuid, "action": "dropped_row|charge_moved|removed|refused", "message": str,
//            and of the first two "row": n, "name": str, "pid": n, and "unique_pages": n,
//            "charged_pages": n or "moved_pages": n}
nlohmann::json ToJson(const std::vector<RepairStep>& steps);

// The exit code: kAuditOk (done, or nothing was to be done), kAuditProblem (a ledger is in use that
// was to be removed), kAuditUnreadable (also: could not be changed), and the usual.
int Repair(const RepairOptions& options);

}  // namespace mvgpu::backend
