#pragma once

#include <string>

#include "backend/trace/trace_accounts.h"

namespace mvgpu::backend {

// For people: at most 100 columns, ends with a newline.
std::string RenderText(const TraceAccounts& accounts, const std::string& path);

// `mvgpu-audit show --trace`: the accounts of a recorded session, as its trace has them. The JSON
// is that of TraceAccounts, which `mvgpu-replay run --json` shows as well. The exit code: kAuditOk,
// kAuditUnreadable.
int ShowRecorded(const std::string& path, bool json);

}  // namespace mvgpu::backend
