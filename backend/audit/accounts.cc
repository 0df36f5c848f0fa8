#include "backend/audit/accounts.h"

#include <utility>

#include "backend/audit/console.h"

namespace mvgpu::backend {

tl::expected<AuditReport, int> ReadAccounts(const LedgerOptions& options) {
  const auto fail = [](AuditExit exit, const std::string& message) {
    return tl::unexpected<int>(Complain(exit, message));
  };
  const auto choice = Resolve(options);
  if (!choice) return fail(kAuditUsage, choice.error().message());
  auto report = Audit(choice->runtime_dir, choice->vm_uuid);
  if (!report) return fail(kAuditUnreadable, report.error().message());
  if (choice->vm_uuid && report->vms.empty() && report->unreadable.empty()) {
    return fail(kAuditNoSuchVm,
                "vm " + *choice->vm_uuid + " has no ledger in " + choice->runtime_dir);
  }
  return std::move(*report);
}

int Answer(const std::string& text, const AuditReport& report, int exit_code) {
  if (const int printed = Print(text); printed != kAuditOk) exit_code = printed;
  for (const AuditReport::Unreadable& unreadable : report.unreadable) {
    exit_code = Complain(kAuditUnreadable, unreadable.error.message());
  }
  return exit_code;
}

}  // namespace mvgpu::backend
