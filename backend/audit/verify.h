#pragma once

#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "backend/audit/report.h"

namespace mvgpu::backend {

// Something about the accounts of a VM that cannot be true.
struct Finding {
  enum class Kind {
    kLedger,     // an invariant of the ledger is broken
    kDeadOwner,  // a row whose process is dead: dropped when the next domain joins
    kNotLocked,  // the kernel counts less for a process than its domains say is locked
    kNotMapped,  // pages of a file are held that none of the VM's processes has mapped
  };
  Kind kind;
  std::string vm_uuid;
  std::optional<unsigned> row;
  std::string message;  // one line

  bool is_like(const Finding& other) const {
    return kind == other.kind && vm_uuid == other.vm_uuid && row == other.row;
  }
};

// Holds the accounts against what the kernel says of the VM's processes. What cannot be seen (a
// process of another pid namespace or another user) is not held against anybody.
std::vector<Finding> Verify(const AuditReport& report);

// Those of `now` that were there before as well. The kernel and the ledger are not read at one
// moment: what was in between them is gone at the second look.
std::vector<Finding> Lasting(const std::vector<Finding>& before, std::vector<Finding> now);

// "ledger", "dead_owner", "not_locked", "not_mapped".
std::string FindingKindName(Finding::Kind kind);

// {"ok": bool, "findings": [{"vm": uuid, "row": n or null, "kind": str, "message": str}]}
nlohmann::json ToJson(const std::vector<Finding>& findings);

}  // namespace mvgpu::backend
