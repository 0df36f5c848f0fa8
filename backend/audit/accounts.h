#pragma once

#include <string>

#include <tl/expected.hpp>

#include "backend/audit/ledger_options.h"
#include "backend/audit/report.h"

namespace mvgpu::backend {

// What the verbs that answer once have in common.

// The accounts that the options ask for, or an exit code: the complaint is made.
tl::expected<AuditReport, int> ReadAccounts(const LedgerOptions& options);

// Prints the answer, says what could not be read, and returns the exit code.
int Answer(const std::string& text, const AuditReport& report, int exit_code);

}  // namespace mvgpu::backend
