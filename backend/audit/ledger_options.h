#pragma once

#include <optional>
#include <string>

#include "apionly-domain/base/error.h"

namespace CLI {
class App;
}

namespace mvgpu::backend {

// Which ledgers a verb looks at, as its command line says it.
struct LedgerOptions {
  std::string vm;           // empty: every VM
  std::string runtime_dir;  // empty: the default

  // Adds --vm and --runtime-dir. This must outlive the parsing.
  void add_to(CLI::App& verb);
};

struct LedgerChoice {
  std::optional<std::string> vm_uuid;  // normalized
  std::string runtime_dir;
};

// Errors: kInvalid (not a UUID), and those of Ledger::DefaultRuntimeDir().
Result<LedgerChoice> Resolve(const LedgerOptions& options);

}  // namespace mvgpu::backend
