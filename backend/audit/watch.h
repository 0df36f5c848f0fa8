#pragma once

#include <cstdint>
#include <optional>

#include "backend/audit/ledger_options.h"

namespace mvgpu::backend {

// `mvgpu-audit watch`: what show shows, again and again, with what changed.
struct WatchOptions {
  // Longer than a day is a typing error, shorter than this shows nothing more.
  static constexpr double kShortest = 0.1;
  static constexpr double kLongest = 86400;

  LedgerOptions ledgers;
  double interval_seconds = 2;
  std::optional<uint64_t> count;  // looks, at least 1; none: until a signal

  // Adds the verb. This must outlive the parsing.
  CLI::App* add_to(CLI::App& app);
};

// Looks at fixed times, until SIGINT, SIGTERM or the last look. VMs come and go meanwhile, and so
// may the one that --vm names. The exit code: kAuditOk, kAuditUsage, kAuditUnreadable (the runtime
// directory could not be read, or stdout not be written).
int Watch(const WatchOptions& options);

}  // namespace mvgpu::backend
