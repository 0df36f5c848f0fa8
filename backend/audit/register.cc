#include "backend/audit/register.h"

#include <fcntl.h>
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>
#include <vector>

#include "apionly-domain/accounting/ledger.h"
#include "apionly-domain/accounting/ledger_file.h"
#include "apionly-domain/accounting/ledger_lookup.h"
#include "apionly-domain/accounting/process_info.h"
#include "apionly-domain/accounting/runtime_dir.h"
#include "backend/audit/accounts.h"
#include "backend/audit/console.h"
#include "backend/audit/vfio_process.h"

namespace mvgpu::backend {

using domain::FileIdentity;
using domain::Ledger;
using domain::LedgerSnapshot;
using domain::ProcessId;

namespace {

using Holdings = std::vector<Ledger::Enrolment::Holding>;
using Mappings = std::vector<domain::LedgerMapping>;

// What was done, for the answer.
struct Outcome {
  std::string vm_uuid;
  std::string action;  // "registered", "withdrawn"
  std::optional<unsigned> row;
  std::string name;
  std::vector<std::string> devices;
  uint64_t pages = 0;
};

// The files of a VM's memory as its ledger knows them: held, or mapped by a domain.
struct MemoryFile {
  FileIdentity identity;
  uint64_t pages = 0;  // the largest that any domain told
};

// What a VM's ledger knows of its memory.
struct VmMemory {
  std::vector<MemoryFile> files;
  Mappings mappings;  // of its first vgpu, in no order
};

// The first domain that is told what the VMM maps: all of the VM's vgpus see memory where that one
// does.
std::optional<unsigned> FirstVgpu(const LedgerSnapshot& ledger) {
  for (const LedgerSnapshot::Row& row : ledger.rows) {
    if (row.kind == static_cast<uint32_t>(domain::DomainKind::kApiOnly) &&
        row.liveness != domain::Liveness::kDead) {
      return row.index;
    }
  }
  return std::nullopt;
}

Result<VmMemory> MemoryOf(const std::string& runtime_dir, const LedgerSnapshot& ledger) {
  VmMemory memory;
  std::vector<MemoryFile>& files = memory.files;
  const auto add = [&files](const FileIdentity& identity, uint64_t pages) {
    for (MemoryFile& file : files) {
      if (file.identity != identity) continue;
      file.pages = std::max(file.pages, pages);
      return;
    }
    files.push_back({identity, pages});
  };
  for (const LedgerSnapshot::File& file : ledger.files) add(file.identity, file.pages);
  MVGPU_ASSIGN_OR_RETURN(const domain::RuntimeDir dir,
                         domain::RuntimeDir::OpenForReading(runtime_dir));
  const std::string name = domain::LedgerFileName(ledger.vm_uuid);
  MVGPU_ASSIGN_OR_RETURN(const UniqueFd fd, dir.open_file(name, O_RDONLY));
  MVGPU_ASSIGN_OR_RETURN(const domain::RowMappingList list,
                         domain::ReadMappings(fd.get(), ledger.path, ledger.vm_uuid, std::nullopt));
  const auto vgpu = FirstVgpu(ledger);
  for (const auto& [row, mapping] : list.entries) {
    add(mapping.file, PagesIn(mapping.file_offset + mapping.iova.size()));
    if (row == vgpu) memory.mappings.push_back(mapping);
  }
  return memory;
}

// The pages of the VM's memory that the process maps: whole files only, since only then it is clear
// what its devices hold.
Holdings WholeFiles(const std::vector<MemoryFile>& files, const VfioProcess& process) {
  Holdings holdings;
  for (const MemoryFile& file : files) {
    const std::vector<PageRun> runs = process.pages_of(file.identity);
    if (runs.size() != 1 || runs[0].first != 0 || runs[0].count < file.pages) continue;
    holdings.push_back({file.identity, runs[0].count, runs[0]});
  }
  return holdings;
}

// Without a guest's IOMMU in between, a VMM shows memory to all devices at guest-physical
// addresses: to its own as to the vgpu. With one, its devices hold all the memory only where the
// guest has told the IOMMU to do the same. The kernel does not say where it really is.
Mappings SeenBy(const Holdings& holdings, const Mappings& of_vgpu) {
  Mappings seen;
  for (const domain::LedgerMapping& mapping : of_vgpu) {
    if (std::any_of(holdings.begin(), holdings.end(),
                    [&](const auto& holding) { return holding.file == mapping.file; })) {
      seen.push_back(mapping);
    }
  }
  return seen;
}

uint64_t PagesOf(const Holdings& holdings) {
  uint64_t pages = 0;
  for (const auto& holding : holdings) pages += holding.pages.count;
  return pages;
}

tl::unexpected<Error> Refuse(std::string message) {
  return Fail(ErrorCode::kNotMapped, std::move(message));
}

// The VM whose memory the process maps, and what of it.
struct Match {
  std::string vm_uuid;
  Holdings holdings;
  Mappings mappings;
};
Result<Match> FindVm(const AuditReport& report, const VfioProcess& process) {
  std::optional<Match> match;
  for (const AuditReport::Vm& vm : report.vms) {
    MVGPU_ASSIGN_OR_RETURN(const VmMemory memory, MemoryOf(report.runtime_dir, vm.ledger));
    Holdings holdings = WholeFiles(memory.files, process);
    if (holdings.empty()) continue;
    if (match) {
      return Refuse(fmt::format("process {} maps memory of vm {} and of vm {}: say which with --vm",
                                process.pid, match->vm_uuid, vm.ledger.vm_uuid));
    }
    Mappings seen = SeenBy(holdings, memory.mappings);
    match = Match{vm.ledger.vm_uuid, std::move(holdings), std::move(seen)};
  }
  if (match) return std::move(*match);
  return Refuse(fmt::format(
      "process {} maps no whole file of memory that a ledger in {} knows; start a vgpu of its vm "
      "first, with shared memory",
      process.pid, report.runtime_dir));
}

// The kernel counts what VFIO and iommufd hold, for each process.
Result<void> CheckKernelCounters(const std::string& proc, const ProcessId& owner,
                                 const Holdings& holdings) {
  const auto kernel = domain::KernelCountersOf(owner, proc);
  if (!kernel) return Refuse(fmt::format("process {} has just ended", owner.pid));
  const uint64_t needed_kb = BytesIn(PagesOf(holdings)) / 1024;
  if (kernel->vm_lck_kb >= needed_kb || kernel->vm_pin_kb >= needed_kb) return {};
  return Refuse(fmt::format(
      "process {} has {} kB locked (VmLck) and {} kB pinned (VmPin) of the vm's {} kB: its devices "
      "do not hold the memory (yet); try again when the guest runs",
      owner.pid, kernel->vm_lck_kb, kernel->vm_pin_kb, needed_kb));
}

Result<Outcome> Enroll(const RegisterOptions& options, const AuditReport& report) {
  MVGPU_ASSIGN_OR_RETURN(const ProcessId owner, domain::FindProcess(options.pid));
  MVGPU_ASSIGN_OR_RETURN(const VfioProcess process, ReadVfioProcess(options.proc, options.pid));
  if (process.devices.empty()) {
    return Refuse(
        fmt::format("process {} ({}) has no vfio device open: none of /dev/vfio/*, "
                    "/dev/vfio/devices/*; name the vmm's own process",
                    process.pid, process.command));
  }
  MVGPU_ASSIGN_OR_RETURN(const Match match, FindVm(report, process));
  MVGPU_RETURN_IF_ERROR(CheckKernelCounters(options.proc, owner, match.holdings));
  MVGPU_ASSIGN_OR_RETURN(const auto ledger, Ledger::Open({report.runtime_dir, match.vm_uuid}));
  MVGPU_ASSIGN_OR_RETURN(const unsigned row,
                         ledger->enroll({.owner = owner,
                                         .kind = domain::DomainKind::kAssignedDevice,
                                         .name = process.command,
                                         .pin_backend = process.backend(),
                                         .holdings = match.holdings,
                                         .mappings = match.mappings}));
  return Outcome{match.vm_uuid,   "registered",    row,
                 process.command, process.devices, PagesOf(match.holdings)};
}

Result<void> Withdraw(const AuditReport& report, const AuditReport::Vm& vm,
                      const LedgerSnapshot::Row& row) {
  if (row.liveness == domain::Liveness::kDead) {
    MVGPU_ASSIGN_OR_RETURN(const ProcessId self, domain::CurrentProcess());
    MVGPU_ASSIGN_OR_RETURN(domain::RuntimeDir dir,
                           domain::RuntimeDir::OpenForReading(report.runtime_dir));
    const domain::LedgerFile file(std::move(dir), vm.ledger.vm_uuid, self);
    MVGPU_ASSIGN_OR_RETURN(const UniqueFd locked, file.LockDirectory());
    return file.DropDead();
  }
  MVGPU_ASSIGN_OR_RETURN(const auto ledger, Ledger::Open({report.runtime_dir, vm.ledger.vm_uuid}));
  return ledger->withdraw(row.owner);
}

Result<Outcome> Undo(const RegisterOptions& options, const AuditReport& report) {
  for (const AuditReport::Vm& vm : report.vms) {
    for (const LedgerSnapshot::Row& row : vm.ledger.rows) {
      if (!row.is_registered || row.owner.pid != options.pid) continue;
      MVGPU_RETURN_IF_ERROR(Withdraw(report, vm, row));
      return Outcome{vm.ledger.vm_uuid, "withdrawn", row.index, row.name, {}, row.unique_pages};
    }
  }
  return Refuse(fmt::format("process {} is not registered in a ledger in {}", options.pid,
                            report.runtime_dir));
}

std::string RenderText(const Outcome& outcome, uint32_t pid) {
  std::string devices;
  for (const std::string& device : outcome.devices) devices += " " + device;
  return fmt::format("vm {}: {} process {} ({}): row {}, {} pages{}{}\n", outcome.vm_uuid,
                     outcome.action, pid, outcome.name, *outcome.row, outcome.pages,
                     devices.empty() ? "" : ", devices", devices);
}

nlohmann::json ToJson(const Outcome& outcome, uint32_t pid) {
  return {{"vm", outcome.vm_uuid}, {"action", outcome.action}, {"pid", pid},
          {"row", *outcome.row},   {"name", outcome.name},     {"devices", outcome.devices},
          {"pages", outcome.pages}};
}

// Whether the answer is bad news about the process, or the ledger could not be changed.
AuditExit ExitOf(const Error& error) {
  switch (error.code()) {
    case ErrorCode::kNotMapped:
    case ErrorCode::kPermission:
    case ErrorCode::kOverlap:
      return kAuditProblem;
    default:
      return kAuditUnreadable;
  }
}

}  // namespace

CLI::App* RegisterOptions::add_to(CLI::App& app) {
  CLI::App* const verb =
      app.add_subcommand("register", "Enter a VMM's own assigned devices in the ledger of its VM");
  verb->footer(
      "The process must have a VFIO device open, map all of a memory file that the ledger knows "
      "and be\ncharged for as much by the kernel. Its row holds the whole file until the process "
      "ends, or --undo,\nand lists the addresses at which the VM's first vgpu sees it now. "
      "After memory was plugged in or out: --undo, and once more.\n\n"
      "Exit codes:\n"
      "  0  done\n"
      "  1  refused, stderr says why\n"
      "  2  wrong usage\n"
      "  3  the VM that --vm names has no ledger\n"
      "  4  a ledger or the runtime directory could not be read or changed, or stdout not be "
      "written");
  verb->add_option("--pid", pid, "the VMM")
      ->required()
      ->check(CLI::Range(uint32_t{1}, uint32_t{1} << 22))
      ->type_name("PID");
  ledgers.add_to(*verb);
  verb->add_flag("--undo", undo, "take the row out again");
  verb->add_option("--proc", proc, "where the proc file system of the VMM's host is mounted")
      ->type_name("DIR")
      ->capture_default_str();
  verb->add_flag("--json", json, "one JSON object instead of a line");
  return verb;
}

int Register(const RegisterOptions& options) {
  const auto report = ReadAccounts(options.ledgers);
  if (!report) return report.error();
  if (report->vms.empty() && !report->unreadable.empty()) return Answer("", *report, kAuditOk);
  const auto outcome = options.undo ? Undo(options, *report) : Enroll(options, *report);
  if (!outcome) return Complain(ExitOf(outcome.error()), outcome.error().message());
  return Print(options.json ? ToJson(*outcome, options.pid).dump(2) + "\n"
                            : RenderText(*outcome, options.pid));
}

}  // namespace mvgpu::backend
