#include "backend/audit/ledger_options.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>

#include "apionly-domain/accounting/ledger.h"
#include "apionly-domain/accounting/runtime_dir.h"

namespace mvgpu::backend {

void LedgerOptions::add_to(CLI::App& verb) {
  verb.add_option("--vm", vm, "only this VM")->type_name("UUID");
  verb.add_option("--runtime-dir", runtime_dir,
                  "where the ledgers are; by default /run/mvgpu for root, $XDG_RUNTIME_DIR/mvgpu "
                  "for others")
      ->type_name("DIR");
}

Result<LedgerChoice> Resolve(const LedgerOptions& options) {
  LedgerChoice choice;
  if (!options.vm.empty()) {
    choice.vm_uuid = domain::NormalizedUuid(options.vm);
    if (!choice.vm_uuid) {
      return Fail(
          ErrorCode::kInvalid,
          fmt::format("--vm '{}' is not a uuid of 8-4-4-4-12 hexadecimal digits", options.vm));
    }
  }
  choice.runtime_dir = options.runtime_dir;
  if (choice.runtime_dir.empty()) {
    MVGPU_ASSIGN_OR_RETURN(choice.runtime_dir, domain::Ledger::DefaultRuntimeDir());
  }
  return choice;
}

}  // namespace mvgpu::backend
