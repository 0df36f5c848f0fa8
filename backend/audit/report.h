#pragma once

#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "apionly-domain/accounting/ledger_view.h"
#include "apionly-domain/base/error.h"

namespace mvgpu::backend {

// What `mvgpu-audit show` found in a runtime directory.
struct AuditReport {
  struct Vm {
    domain::LedgerSnapshot ledger;
    // By row: what the kernel counts for its process; none when that is gone or out of sight.
    std::vector<std::optional<domain::KernelCounters>> kernel;
    std::vector<std::string> problems;  // broken invariants
  };
  struct Unreadable {
    std::string vm_uuid;
    Error error;
  };

  std::string runtime_dir;
  std::vector<Vm> vms;
  std::vector<Unreadable> unreadable;
};

// Reads one VM's ledger, or that of every VM in the directory. A directory that does not exist has
// none. Errors: what RuntimeDir answers. A VM that is asked for and not there gives an empty
// report.
Result<AuditReport> Audit(const std::string& runtime_dir,
                          const std::optional<std::string>& vm_uuid);

// For people: at most 100 columns, ends with a newline.
std::string RenderText(const AuditReport& report);

// For programs. Fields are only ever added:
//   {"runtime_dir": str, "page_size": 4096,
//    "vms": [{"vm": uuid, "ledger": path, "consistent": bool, "in_motion": bool, "repairs": n,
//             "problems": [str], "totals": {"unique_pages": n, "charged_pages": n},
//             "domains": [{"row": n, "name": str, "kind": str, "pid": n, "state":
//             "alive|dead|unknown",
//                          "pin_backend": str, "granule_pages": n, "mapped_pages": n,
//                          "pinned_pages": n, "unique_pages": n, "charged_pages": n,
//                          "locked_pages": n, "percent_of_mapped": number or null,   unique of
//                          mapped "kernel": {"vm_lck_kb": n, "vm_pin_kb": n} or null}],   of the
//                          whole process
//             "files": [{"device": n, "inode": n, "pages": n, "unique_pages": n}]}],
//    "errors": [{"vm": uuid, "error": {"code": str, "message": str}}]}
nlohmann::json ToJson(const AuditReport& report);

}  // namespace mvgpu::backend
