#pragma once

#include <cstdint>
#include <string>

#include "backend/audit/ledger_options.h"

namespace mvgpu::backend {

// `mvgpu-audit register`: a VMM's own assigned devices join the ledger of its VM. They hold all of
// the VM's memory, and the VMM knows nothing of ledgers.
struct RegisterOptions {
  LedgerOptions ledgers;
  uint32_t pid = 0;
  bool undo = false;
  bool json = false;
  std::string proc = "/proc";

  // Adds the verb. This must outlive the parsing.
  CLI::App* add_to(CLI::App& app);
};

// The exit code: kAuditOk, kAuditProblem (refused: the process is not there or not ours, or has no
// assigned devices that hold memory of a VM), and the usual.
int Register(const RegisterOptions& options);

}  // namespace mvgpu::backend
