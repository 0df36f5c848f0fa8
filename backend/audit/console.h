#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace mvgpu::backend {

// How mvgpu-audit ends. Scripts rely on these numbers: they never change their meaning.
enum AuditExit {
  kAuditOk = 0,
  kAuditProblem = 1,   // the question was answered, and the answer is bad news
  kAuditUsage = 2,     // command line
  kAuditNoSuchVm = 3,  // the VM that --vm names has no ledger
  // A ledger or the runtime directory could not be read, or stdout not be written.
  kAuditUnreadable = 4,
};

// One line on stderr. Answers the exit code, for `return Complain(...)`.
int Complain(AuditExit exit, std::string_view message);

// Writes all of the text to stdout. Answers kAuditOk, or complains.
int Print(std::string_view text);

// The size in the largest unit that gives a whole number: "8 GiB", "1536 MiB", "4097 bytes".
std::string SizeText(uint64_t bytes);

}  // namespace mvgpu::backend
