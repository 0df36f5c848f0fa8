// mvgpu-audit: says, per VM, who pins what, what is shared and who is charged (show, watch), and
// before a VM is started how much may be locked for it (preflight). Reads the ledgers that the
// domains of a VM keep, without the help of the processes that wrote them, and changes nothing.

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "backend/audit/console.h"
#include "backend/audit/ledger_options.h"
#include "backend/audit/metrics.h"
#include "backend/audit/preflight.h"
#include "backend/audit/report.h"
#include "backend/audit/watch.h"

namespace mvgpu::backend {
namespace {

constexpr char kExitCodes[] =
    "Exit codes:\n"
    "  0  the accounts were read (show warns about what is wrong with them)\n"
    "  1  preflight: something is too small\n"
    "  2  wrong usage\n"
    "  3  show: the VM that --vm names has no ledger\n"
    "  4  a ledger or the runtime directory could not be read (the others were shown), or stdout\n"
    "     not be written";

constexpr char kColumns[] =
    "Pages of 4096 bytes, per domain:\n"
    "  MAPPED   in the container, with a file behind\n"
    "  PINNED   sum over all pins: a page pinned twice counts twice\n"
    "  UNIQUE   held, every page of a file once; UNIQ% is its share of MAPPED\n"
    "  CHARGED  of these, paid for by this domain: over all domains of the VM every page once\n"
    "  LOCKED   what the kernel was asked to hold, whole granules\n"
    "Below them what the kernel counts for the whole process (VmLck, VmPin).\n\n";

struct ShowOptions {
  LedgerOptions ledgers;
  bool json = false;
  bool metrics = false;

  CLI::App* add_to(CLI::App& app) {
    CLI::App* const show = app.add_subcommand("show", "Show the accounts of every VM");
    show->footer(std::string(kColumns) + kExitCodes);
    ledgers.add_to(*show);
    auto* const as_json = show->add_flag("--json", json, "one JSON object instead of a table");
    show->add_flag("--metrics", metrics, "OpenMetrics text instead of a table")->excludes(as_json);
    return show;
  }
};

int Show(const ShowOptions& options) {
  const auto choice = Resolve(options.ledgers);
  if (!choice) return Complain(kAuditUsage, choice.error().message());
  const auto report = Audit(choice->runtime_dir, choice->vm_uuid);
  if (!report) return Complain(kAuditUnreadable, report.error().message());
  if (choice->vm_uuid && report->vms.empty() && report->unreadable.empty()) {
    return Complain(kAuditNoSuchVm,
                    "vm " + *choice->vm_uuid + " has no ledger in " + choice->runtime_dir);
  }
  const int printed = Print(options.json      ? ToJson(*report).dump(2) + "\n"
                            : options.metrics ? RenderMetrics(*report)
                                              : RenderText(*report));
  for (const AuditReport::Unreadable& unreadable : report->unreadable) {
    Complain(kAuditUnreadable, unreadable.error.message());
  }
  return report->unreadable.empty() ? printed : kAuditUnreadable;
}

int Main(int argc, char** argv) {
  CLI::App app("Says who pins which pages of a VM and who is charged for them", "mvgpu-audit");
  app.set_version_flag("--version", std::string("mvgpu-audit " MVGPU_VERSION));
  app.footer(kExitCodes);
  app.require_subcommand(1);
  ShowOptions show_options;
  WatchOptions watch_options;
  PreflightOptions preflight_options;
  show_options.add_to(app);
  const CLI::App* const watch = watch_options.add_to(app);
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
  if (watch->parsed()) return Watch(watch_options);
  if (preflight->parsed()) return Preflight(std::move(preflight_options));
  return Show(show_options);
}

}  // namespace
}  // namespace mvgpu::backend

int main(int argc, char** argv) { return mvgpu::backend::Main(argc, argv); }
