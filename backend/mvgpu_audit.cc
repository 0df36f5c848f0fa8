// mvgpu-audit: says, per VM, who pins what, what is shared and who is charged. Reads the ledgers
// that the domains of a VM keep, without the help of the processes that wrote them, and changes
// nothing.

#include <CLI/CLI.hpp>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "apionly-domain/accounting/ledger.h"
#include "apionly-domain/accounting/runtime_dir.h"
#include "apionly-domain/base/error.h"
#include "backend/audit/report.h"

namespace mvgpu::backend {
namespace {

enum ExitCode { kExitOk = 0, kExitUsage = 2, kExitNoSuchVm = 3, kExitUnreadable = 4 };

constexpr char kExitCodes[] =
    "Exit codes:\n"
    "  0  the accounts were read (show warns about what is wrong with them)\n"
    "  2  wrong usage\n"
    "  3  the VM that --vm names has no ledger\n"
    "  4  a ledger or the runtime directory could not be read; the others were shown";

constexpr char kColumns[] =
    "Pages of 4096 bytes, per domain:\n"
    "  MAPPED   in the container, with a file behind\n"
    "  PINNED   sum over all pins: a page pinned twice counts twice\n"
    "  UNIQUE   held, every page of a file once; UNIQ% is its share of MAPPED\n"
    "  CHARGED  of these, paid for by this domain: over all domains of the VM every page once\n"
    "  LOCKED   what the kernel was asked to hold, whole granules\n"
    "Below them what the kernel counts for the whole process (VmLck, VmPin).\n\n";

struct ShowOptions {
  std::string vm;
  std::string runtime_dir;
  bool json = false;
};

int Complain(int exit_code, const std::string& message) {
  std::fprintf(stderr, "mvgpu-audit: %s\n", message.c_str());
  return exit_code;
}

int Show(const ShowOptions& options) {
  std::optional<std::string> vm_uuid;
  if (!options.vm.empty()) {
    vm_uuid = domain::NormalizedUuid(options.vm);
    if (!vm_uuid) {
      return Complain(kExitUsage,
                      "--vm '" + options.vm + "' is not a uuid of 8-4-4-4-12 hexadecimal digits");
    }
  }
  std::string runtime_dir = options.runtime_dir;
  if (runtime_dir.empty()) {
    auto standard = domain::Ledger::DefaultRuntimeDir();
    if (!standard) return Complain(kExitUsage, standard.error().message());
    runtime_dir = std::move(*standard);
  }
  const auto report = Audit(runtime_dir, vm_uuid);
  if (!report) return Complain(kExitUnreadable, report.error().message());
  if (vm_uuid && report->vms.empty() && report->unreadable.empty()) {
    return Complain(kExitNoSuchVm, "vm " + *vm_uuid + " has no ledger in " + runtime_dir);
  }
  const std::string text = options.json ? ToJson(*report).dump(2) + "\n" : RenderText(*report);
  std::fwrite(text.data(), 1, text.size(), stdout);
  for (const AuditReport::Unreadable& unreadable : report->unreadable) {
    Complain(kExitUnreadable, unreadable.error.message());
  }
  if (std::fflush(stdout) != 0) return Complain(kExitUnreadable, "cannot write to stdout");
  return report->unreadable.empty() ? kExitOk : kExitUnreadable;
}

int Main(int argc, char** argv) {
  CLI::App app("Says who pins which pages of a VM and who is charged for them", "mvgpu-audit");
  app.set_version_flag("--version", std::string("mvgpu-audit " MVGPU_VERSION));
  app.footer(kExitCodes);
  app.require_subcommand(1);
  ShowOptions options;
  CLI::App* show = app.add_subcommand("show", "Show the accounts of every VM");
  show->footer(std::string(kColumns) + kExitCodes);
  show->add_option("--vm", options.vm, "only this VM")->type_name("UUID");
  show->add_option("--runtime-dir", options.runtime_dir,
                   "where the ledgers are; by default /run/mvgpu for root, $XDG_RUNTIME_DIR/mvgpu "
                   "for others")
      ->type_name("DIR");
  show->add_flag("--json", options.json, "one JSON object instead of a table");
  // The library reports everything, --help included, by throwing.
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& request) {
    return app.exit(request);
  } catch (const CLI::ParseError& error) {
    std::string message = error.what();
    for (char& c : message) c = c == '\n' ? ' ' : c;
    return Complain(kExitUsage, message + "; see mvgpu-audit --help");
  }
  return Show(options);
}

}  // namespace
}  // namespace mvgpu::backend

int main(int argc, char** argv) { return mvgpu::backend::Main(argc, argv); }
