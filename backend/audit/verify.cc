#include "backend/audit/verify.h"

#include <fmt/format.h>
#include <sys/sysmacros.h>

#include <algorithm>
#include <charconv>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string_view>
#include <utility>

namespace mvgpu::backend {

using domain::FileIdentity;
using domain::LedgerSnapshot;
using domain::Liveness;

namespace {

using Files = std::set<std::pair<uint64_t, uint64_t>>;  // device, inode

// The file of a line of proc(5) maps: address perms offset major:minor inode path.
std::optional<std::pair<uint64_t, uint64_t>> FileIn(std::string_view line) {
  for (int field = 0; field < 3; ++field) {
    const size_t space = line.find(' ');
    if (space == line.npos) return std::nullopt;
    line.remove_prefix(space + 1);
  }
  const char* at = line.data();
  const char* const end = at + line.size();
  const auto take = [&](auto* number, int base, char behind) {
    const auto [stop, error] = std::from_chars(at, end, *number, base);
    if (error != std::errc() || stop == end || *stop != behind) return false;
    at = stop + 1;
    return true;
  };
  unsigned major = 0;
  unsigned minor = 0;
  uint64_t inode = 0;
  if (!take(&major, 16, ':') || !take(&minor, 16, ' ') || !take(&inode, 10, ' ')) {
    return std::nullopt;
  }
  return std::pair(makedev(major, minor), inode);
}

// Takes what the process maps off the list. False when it may not be looked at. A process with
// locks here and there has thousands of lines, so no more of them are read than it takes.
bool StrikeMapped(uint32_t pid, Files& missing) {
  std::ifstream maps(fmt::format("/proc/{}/maps", pid));
  if (!maps.is_open()) return false;
  for (std::string line; !missing.empty() && std::getline(maps, line);) {
    if (const auto file = FileIn(line)) missing.erase(*file);
  }
  return missing.empty() || maps.eof();
}

void CheckOwners(const AuditReport::Vm& vm, std::vector<Finding>& findings) {
  for (const LedgerSnapshot::Row& row : vm.ledger.rows) {
    if (row.liveness != Liveness::kDead) continue;
    findings.push_back({Finding::Kind::kDeadOwner, vm.ledger.vm_uuid, row.index,
                        fmt::format("row {} ({}) holds {} pages for process {}, which is dead",
                                    row.index, row.name, row.unique_pages, row.owner.pid)});
  }
}

// The kernel counts by process; one may have several domains, and they may share a counter.
void CheckLocked(const AuditReport::Vm& vm, std::vector<Finding>& findings) {
  const auto check = [&](size_t first, std::string_view name, uint64_t kernel_kb) {
    const LedgerSnapshot::Row& row = vm.ledger.rows[first];
    uint64_t locked = 0;
    for (const LedgerSnapshot::Row& other : vm.ledger.rows) {
      if (!(other.owner == row.owner)) continue;
      if (domain::KernelCounterName(other.pin_backend) != name) continue;
      if (other.index < row.index) return;  // said at the first row of the process
      locked += other.locked_pages;
    }
    if (domain::KernelCounterName(row.pin_backend) != name) return;
    if (BytesIn(locked) / 1024 <= kernel_kb) return;
    findings.push_back(
        {Finding::Kind::kNotLocked, vm.ledger.vm_uuid, row.index,
         fmt::format("row {} ({}): process {} says that {} kB are locked, the kernel counts {} kB "
                     "({}){}",
                     row.index, row.name, row.owner.pid, BytesIn(locked) / 1024, kernel_kb, name,
                     row.is_registered ? fmt::format("; if its devices were unplugged: register "
                                                     "--undo --pid={}",
                                                     row.owner.pid)
                                       : "")});
  };
  for (size_t i = 0; i < vm.ledger.rows.size(); ++i) {
    if (!vm.kernel[i]) continue;
    check(i, "VmLck", vm.kernel[i]->vm_lck_kb);
    check(i, "VmPin", vm.kernel[i]->vm_pin_kb);
  }
}

void CheckFiles(const AuditReport::Vm& vm, std::vector<Finding>& findings) {
  Files missing;
  for (const LedgerSnapshot::File& file : vm.ledger.files) {
    if (file.unique_pages != 0) missing.insert({file.identity.device, file.identity.inode});
  }
  std::set<uint32_t> seen;
  for (const LedgerSnapshot::Row& row : vm.ledger.rows) {
    if (row.liveness == Liveness::kDead) continue;
    if (row.liveness == Liveness::kUnknown) return;
    if (!seen.insert(row.owner.pid).second) continue;
    if (!StrikeMapped(row.owner.pid, missing)) return;
  }
  for (const LedgerSnapshot::File& file : vm.ledger.files) {
    if (!missing.contains({file.identity.device, file.identity.inode})) continue;
    findings.push_back(
        {Finding::Kind::kNotMapped, vm.ledger.vm_uuid, std::nullopt,
         fmt::format("{} pages of file {}:{} are held, but no living process of the vm maps it",
                     file.unique_pages, file.identity.device, file.identity.inode)});
  }
}

}  // namespace

std::vector<Finding> Verify(const AuditReport& report) {
  std::vector<Finding> findings;
  for (const AuditReport::Vm& vm : report.vms) {
    for (const std::string& problem : vm.problems) {
      findings.push_back({Finding::Kind::kLedger, vm.ledger.vm_uuid, std::nullopt, problem});
    }
    CheckOwners(vm, findings);
    CheckLocked(vm, findings);
    CheckFiles(vm, findings);
  }
  return findings;
}

std::vector<Finding> Lasting(const std::vector<Finding>& before, std::vector<Finding> now) {
  std::erase_if(now, [&](const Finding& finding) {
    return std::none_of(before.begin(), before.end(),
                        [&](const Finding& other) { return finding.is_like(other); });
  });
  return now;
}

std::string FindingKindName(Finding::Kind kind) {
  switch (kind) {
    case Finding::Kind::kLedger:
      return "ledger";
    case Finding::Kind::kDeadOwner:
      return "dead_owner";
    case Finding::Kind::kNotLocked:
      return "not_locked";
    case Finding::Kind::kNotMapped:
      break;
  }
  return "not_mapped";
}

nlohmann::json ToJson(const std::vector<Finding>& findings) {
  nlohmann::json list = nlohmann::json::array();
  for (const Finding& finding : findings) {
    list.push_back({{"vm", finding.vm_uuid},
                    {"row", finding.row ? nlohmann::json(*finding.row) : nlohmann::json()},
                    {"kind", FindingKindName(finding.kind)},
                    {"message", finding.message}});
  }
  return {{"ok", findings.empty()}, {"findings", std::move(list)}};
}

}  // namespace mvgpu::backend
