#pragma once

#include <optional>
#include <string>
#include <string_view>
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
  std::optional<std::string> only_vm;  // the one that was asked for
  std::vector<Vm> vms;
  std::vector<Unreadable> unreadable;
};

// Reads one VM's ledger, or that of every VM in the directory. A directory that does not exist has
// none. Errors: what RuntimeDir answers. A VM that is asked for and not there gives an empty
// report.
Result<AuditReport> Audit(const std::string& runtime_dir,
                          const std::optional<std::string>& vm_uuid);

// "alive", "dead" or "unknown".
std::string_view StateName(domain::Liveness liveness);

// For people: at most 100 columns, ends with a newline. With an earlier report of the same
// directory, a line below each domain says what changed, and another who came and who went.
std::string RenderText(const AuditReport& report, const AuditReport* before = nullptr);

// For programs. Fields are only ever added. n is a number, kernel counters are of the whole
// process, percent_of_mapped is the share of unique_pages.
//   {"runtime_dir": str, "page_size": 4096, "vms": [VM], "errors": [ERROR]}
//   VM      {"vm": uuid, "ledger": path, "consistent": bool, "in_motion": bool, "repairs": n,
//            "problems": [str], "totals": {"unique_pages": n, "charged_pages": n},
//            "domains": [DOMAIN], "files": [FILE]}
//   DOMAIN  {"row": n, "name": str, "kind": "api-only|assigned|nested|kind-N", "pid": n,
//            "state": "alive|dead|unknown", "registered": bool, "pin_backend": str,
//            "granule_pages": n,
//            "mapped_pages": n, "pinned_pages": n, "unique_pages": n, "charged_pages": n,
//            "locked_pages": n, "locked_areas": n, "area_budget": n (0: no limit),
//            "unlisted_mappings": n (see explain),
//            "percent_of_mapped": n or null,
//            "dma_cache": {"cached_pages": n, "idle_pages": n, "hit_pages": n, "miss_pages": n,
//                          "unmapped_pages": n, "revoked_pages": n, "evicted_pages": n},
//            "kernel": {"vm_lck_kb": n, "vm_pin_kb": n} or null}
//   FILE    {"device": n, "inode": n, "pages": n, "unique_pages": n}
//   ERROR   {"vm": uuid, "error": {"code": str, "message": str}}
nlohmann::json ToJson(const AuditReport& report);
// The "errors" of it, which other reports have as well.
nlohmann::json ErrorsJson(const AuditReport& report);

}  // namespace mvgpu::backend
