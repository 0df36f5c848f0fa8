// mvgpu-audit: says, per VM, who pins what, what is shared and who is charged (show, watch), and
// before a VM is started how much may be locked for it (preflight). Reads the ledgers that the
// domains of a VM keep, without the help of the processes that wrote them. Whether the accounts can
// be true, it says too (verify), and what lies behind an address (explain). Two verbs change
// ledgers: repair drops what the dead left, register adds devices that the VMM assigned by itself.

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "backend/audit/accounts.h"
#include "backend/audit/console.h"
#include "backend/audit/explain.h"
#include "backend/audit/ledger_options.h"
#include "backend/audit/metrics.h"
#include "backend/audit/preflight.h"
#include "backend/audit/recorded.h"
#include "backend/audit/register.h"
#include "backend/audit/repair.h"
#include "backend/audit/report.h"
#include "backend/audit/verify.h"
#include "backend/audit/watch.h"

namespace mvgpu::backend {
namespace {

constexpr char kExitCodes[] =
    "Exit codes:\n"
    "  0  the accounts were read (show warns about what is wrong with them)\n"
    "  1  preflight: something is too small; verify: something about the accounts is wrong\n"
    "  2  wrong usage\n"
    "  3  show, verify: the VM that --vm names has no ledger\n"
    "  4  a ledger, the trace or the runtime directory could not be read (the others were shown),\n"
    "     or stdout not be written";

constexpr char kColumns[] =
    "Pages of 4096 bytes, per domain:\n"
    "  MAPPED   in the container, with a file behind\n"
    "  PINNED   sum over all pins: a page pinned twice counts twice\n"
    "  UNIQUE   held, every page of a file once; UNIQ% is its share of MAPPED\n"
    "  CHARGED  of these, paid for by this domain: over all domains of the VM every page once\n"
    "  LOCKED   what the kernel was asked to hold, whole granules\n"
    "Below them what the kernel counts for the whole process (VmLck, VmPin).\n\n";

constexpr char kChecks[] =
    "What is held against what:\n"
    "  the bits of each row     against its counters, and against the sizes of the files\n"
    "  the owner of each row    must be alive\n"
    "  locked pages             against what the kernel counts for the process (VmLck, VmPin)\n"
    "  files that are held      must still be mapped by a process of the VM\n\n";

struct ShowOptions {
  LedgerOptions ledgers;
  bool json = false;
  bool metrics = false;
  std::string trace;

  void add_to(CLI::App& app) {
    CLI::App* const show = app.add_subcommand("show", "Show the accounts of every VM");
    show->footer(std::string(kColumns) + kExitCodes);
    ledgers.add_to(*show);
    auto* const as_json = show->add_flag("--json", json, "one JSON object instead of a table");
    auto* const as_metrics =
        show->add_flag("--metrics", metrics, "OpenMetrics text instead of a table")
            ->excludes(as_json);
    show->add_option("--trace", trace, "the accounts of a recorded session instead")
        ->excludes(as_metrics)
        ->excludes("--vm")
        ->excludes("--runtime-dir")
        ->type_name("FILE");
  }
};

struct VerifyOptions {
  LedgerOptions ledgers;
  bool json = false;

  CLI::App* add_to(CLI::App& app) {
    CLI::App* const verify =
        app.add_subcommand("verify", "Check the accounts of every VM; silent when they are right");
    verify->footer(std::string(kChecks) + kExitCodes);
    ledgers.add_to(*verify);
    verify->add_flag("--json", json, "one JSON object instead of lines");
    return verify;
  }
};

int Show(const ShowOptions& options) {
  if (!options.trace.empty()) return ShowRecorded(options.trace, options.json);
  const auto report = ReadAccounts(options.ledgers);
  if (!report) return report.error();
  const std::string text = options.json      ? ToJson(*report).dump(2) + "\n"
                           : options.metrics ? RenderMetrics(*report)
                                             : RenderText(*report);
  return Answer(text, *report, kAuditOk);
}

int VerifyAccounts(const VerifyOptions& options) {
  auto report = ReadAccounts(options.ledgers);
  if (!report) return report.error();
  std::vector<Finding> findings = Verify(*report);
  if (!findings.empty()) {
    report = ReadAccounts(options.ledgers);
    if (!report) return report.error();
    findings = Lasting(findings, Verify(*report));
  }
  std::string text;
  for (const Finding& finding : findings) {
    text += "vm " + finding.vm_uuid + ": " + finding.message + "\n";
  }
  if (options.json) text = ToJson(findings).dump(2) + "\n";
  return Answer(text, *report, findings.empty() ? kAuditOk : kAuditProblem);
}

int Main(int argc, char** argv) {
  CLI::App app("Says who pins which pages of a VM and who is charged for them", "mvgpu-audit");
  app.set_version_flag("--version", std::string("mvgpu-audit " MVGPU_VERSION));
  app.footer(kExitCodes);
  app.require_subcommand(1);
  ShowOptions show_options;
  VerifyOptions verify_options;
  WatchOptions watch_options;
  PreflightOptions preflight_options;
  ExplainOptions explain_options;
  RepairOptions repair_options;
  RegisterOptions register_options;
  show_options.add_to(app);
  const CLI::App* const verify = verify_options.add_to(app);
  const CLI::App* const watch = watch_options.add_to(app);
  const CLI::App* const explain = explain_options.add_to(app);
  const CLI::App* const repair = repair_options.add_to(app);
  const CLI::App* const enroll = register_options.add_to(app);
  const CLI::App* const preflight = preflight_options.add_to(app);
  // The library reports everything, --help included, by throwing.
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& request) {
    return app.exit(request);
  } catch (const CLI::ParseError& error) {
    std::string message = error.what();
    for (char& c : message) c = c == '\n' ? ' ' : c;
    return Complain(kAuditUsage, message + "; see mvgpu-audit --help");
  }
  if (verify->parsed()) return VerifyAccounts(verify_options);
  if (watch->parsed()) return Watch(watch_options);
  if (explain->parsed()) return Explain(explain_options);
  if (repair->parsed()) return Repair(repair_options);
  if (enroll->parsed()) return Register(register_options);
  if (preflight->parsed()) return Preflight(std::move(preflight_options));
  return Show(show_options);
}

}  // namespace
}  // namespace mvgpu::backend

int main(int argc, char** argv) { return mvgpu::backend::Main(argc, argv); }
