#include "backend/audit/report.h"

#include <fmt/format.h>

#include <iterator>
#include <nlohmann/json.hpp>
#include <set>
#include <string_view>
#include <utility>

namespace mvgpu::backend {

using domain::KernelCounters;
using domain::LedgerSnapshot;
using domain::Liveness;

std::string_view StateName(Liveness liveness) {
  switch (liveness) {
    case Liveness::kAlive:
      return "alive";
    case Liveness::kDead:
      return "dead";
    case Liveness::kUnknown:
      break;
  }
  return "unknown";
}

namespace {

std::optional<double> PercentOfMapped(const LedgerSnapshot::Row& row) {
  if (row.mapped_pages == 0) return std::nullopt;
  return 100.0 * static_cast<double>(row.unique_pages) / static_cast<double>(row.mapped_pages);
}

std::string Shortened(std::string text, size_t width) {
  if (text.size() > width) text.replace(width - 1, std::string::npos, "~");
  return text;
}

using Out = std::back_insert_iterator<std::string>;

void RenderRow(Out out, const LedgerSnapshot::Row& row) {
  const auto percent = PercentOfMapped(row);
  fmt::format_to(out, "  {:<15} {:<8} {:>7} {:<7} {:>10} {:>9} {:>6} {:>9} {:>9} {:>9}\n",
                 Shortened(row.name, 15), Shortened(domain::DomainKindName(row.kind), 8),
                 row.owner.pid, StateName(row.liveness), row.mapped_pages, row.pinned_pages,
                 percent ? fmt::format("{:.2f}", *percent) : "-", row.unique_pages,
                 row.charged_pages, row.locked_pages);
}

bool SameDomain(const LedgerSnapshot::Row& a, const LedgerSnapshot::Row& b) {
  return a.index == b.index && a.owner == b.owner && a.name == b.name;
}

const LedgerSnapshot::Row* Find(const AuditReport::Vm& vm, const LedgerSnapshot::Row& row) {
  for (const LedgerSnapshot::Row& other : vm.ledger.rows) {
    if (SameDomain(other, row)) return &other;
  }
  return nullptr;
}

const AuditReport::Vm* Find(const AuditReport& report, const std::string& vm_uuid) {
  for (const AuditReport::Vm& vm : report.vms) {
    if (vm.ledger.vm_uuid == vm_uuid) return &vm;
  }
  return nullptr;
}

// "+3", "-4", or nothing where nothing changed.
std::string Change(uint64_t before, uint64_t now) {
  if (now == before) return {};
  return now > before ? fmt::format("+{}", now - before) : fmt::format("-{}", before - now);
}

// Below the row, in its columns.
void RenderChange(Out out, const LedgerSnapshot::Row& before, const LedgerSnapshot::Row& now) {
  const std::string mapped = Change(before.mapped_pages, now.mapped_pages);
  const std::string pinned = Change(before.pinned_pages, now.pinned_pages);
  const std::string unique = Change(before.unique_pages, now.unique_pages);
  const std::string charged = Change(before.charged_pages, now.charged_pages);
  const std::string locked = Change(before.locked_pages, now.locked_pages);
  if ((mapped + pinned + unique + charged + locked).empty()) return;
  fmt::format_to(out, "  {:<40} {:>10} {:>9} {:>6} {:>9} {:>9} {:>9}\n", "  change", mapped, pinned,
                 "", unique, charged, locked);
}

// Who was there, and is there no more.
void RenderGone(Out out, const AuditReport::Vm& before, const AuditReport::Vm& now) {
  for (const LedgerSnapshot::Row& row : before.ledger.rows) {
    if (Find(now, row) != nullptr) continue;
    fmt::format_to(out, "  {:<15} has left, pid {}\n", Shortened(row.name, 15), row.owner.pid);
  }
}

bool IsUnreadable(const AuditReport& report, const std::string& vm_uuid) {
  for (const AuditReport::Unreadable& unreadable : report.unreadable) {
    if (unreadable.vm_uuid == vm_uuid) return true;
  }
  return false;
}

void RenderEnded(Out out, const AuditReport& before, const AuditReport& now) {
  for (const AuditReport::Vm& vm : before.vms) {
    const std::string& vm_uuid = vm.ledger.vm_uuid;
    if (Find(now, vm_uuid) != nullptr || IsUnreadable(now, vm_uuid)) continue;
    fmt::format_to(out, "VM {} has ended\n", vm_uuid);
  }
}

// Where the kernel counts what a pin back end holds.
std::string KernelFigureOf(std::string_view pin_backend) {
  const std::string_view name = domain::KernelCounterName(pin_backend);
  return name.empty() ? "" : fmt::format(" ({})", name);
}

// What the kernel counts more than once, and nobody can help.
void RenderCountedAgain(Out out, const LedgerSnapshot::Row& row) {
  const bool is_device = row.pin_backend == "vfio-type1" || row.pin_backend == "iommufd";
  if (!is_device || row.locked_pages <= row.unique_pages) return;
  fmt::format_to(out, "  {}: {} pages counted again by {}, at each further iova\n",
                 Shortened(row.name, 15), row.locked_pages - row.unique_pages, row.pin_backend);
}

// A ledger may say what it likes.
uint64_t BytesOf(uint64_t pages) {
  return pages > PagesIn(UINT64_MAX) ? UINT64_MAX : BytesIn(pages);
}

// Three lines, so that large counts fit into 100 columns.
void RenderCache(Out out, const LedgerSnapshot::Row& row) {
  const domain::CacheFigures& cache = row.cache;
  if (cache == domain::CacheFigures{}) return;
  const std::string name = Shortened(row.name, 15);
  fmt::format_to(out, "  {}: dma cache: {} pages ({} kB), {} of them idle ({} kB)\n", name,
                 cache.cached_pages, BytesOf(cache.cached_pages) / 1024, cache.idle_pages,
                 BytesOf(cache.idle_pages) / 1024);
  fmt::format_to(out, "  {}: dma cache: {} hits, {} misses; {} maps, {} mapper calls\n", name,
                 cache.hit_pages, cache.miss_pages, cache.map_calls, cache.mapper_calls);
  if (cache.unmapped_pages == 0 && cache.revocations == 0) return;
  fmt::format_to(out, "  {}: dma cache: {} unmapped: {} revoked ({} users told), {} evicted\n",
                 name, cache.unmapped_pages, cache.revoked_pages, cache.revocations,
                 cache.evicted_pages);
  if (cache.moved_pages == 0) return;
  fmt::format_to(out, "  {}: dma cache: {} of those revoked had been moved by the kernel\n", name,
                 cache.moved_pages);
}

// Processes, not rows: the kernel does not know of domains.
void RenderKernel(Out out, const AuditReport::Vm& vm) {
  std::set<uint32_t> seen;
  for (size_t i = 0; i < vm.ledger.rows.size(); ++i) {
    const uint32_t pid = vm.ledger.rows[i].owner.pid;
    if (!vm.kernel[i] || !seen.insert(pid).second) continue;
    uint64_t locked = 0;
    for (const LedgerSnapshot::Row& row : vm.ledger.rows) {
      if (row.owner == vm.ledger.rows[i].owner) locked += row.locked_pages;
    }
    fmt::format_to(
        out, "  pid {}: kernel VmLck {} kB, VmPin {} kB; the ledger's locked pages are {} kB\n",
        pid, vm.kernel[i]->vm_lck_kb, vm.kernel[i]->vm_pin_kb, BytesIn(locked) / 1024);
  }
  for (const LedgerSnapshot::Row& row : vm.ledger.rows) {
    fmt::format_to(out, "  {}: pinned by {}{}, {}-page granules", Shortened(row.name, 15),
                   row.pin_backend, KernelFigureOf(row.pin_backend), row.granule_pages);
    if (row.area_budget != 0) {
      fmt::format_to(out, ", {} of {} memory areas", row.locked_areas, row.area_budget);
    }
    fmt::format_to(out, "\n");
    RenderCountedAgain(out, row);
    RenderCache(out, row);
  }
}

void RenderVm(Out out, const AuditReport::Vm& vm, const AuditReport::Vm* before) {
  fmt::format_to(out, "VM {}\n  {}\n", vm.ledger.vm_uuid, vm.ledger.path);
  fmt::format_to(out, "  {:<15} {:<8} {:>7} {:<7} {:>10} {:>9} {:>6} {:>9} {:>9} {:>9}\n", "DOMAIN",
                 "KIND", "PID", "STATE", "MAPPED", "PINNED", "UNIQ%", "UNIQUE", "CHARGED",
                 "LOCKED");
  bool any_dead = false;
  for (const LedgerSnapshot::Row& row : vm.ledger.rows) {
    RenderRow(out, row);
    any_dead |= row.liveness == Liveness::kDead;
    if (before == nullptr) continue;
    if (const auto* earlier = Find(*before, row)) {
      RenderChange(out, *earlier, row);
    } else {
      fmt::format_to(out, "    has joined\n");
    }
  }
  if (before != nullptr) RenderGone(out, *before, vm);
  fmt::format_to(out, "  {:<68} {:>9} {:>9}\n", "total of the VM, every page once",
                 vm.ledger.unique_pages, vm.ledger.charged_pages());
  RenderKernel(out, vm);
  if (vm.ledger.in_motion)
    fmt::format_to(out, "  note: figures were in motion while they were read\n");
  if (any_dead) {
    fmt::format_to(out,
                   "  note: rows of dead processes are dropped when the next domain joins, or by "
                   "repair\n");
  }
  for (const std::string& problem : vm.problems) fmt::format_to(out, "  warning: {}\n", problem);
}

Result<AuditReport::Vm> ReadVm(const domain::RuntimeDir& dir, const std::string& vm_uuid) {
  AuditReport::Vm vm;
  MVGPU_ASSIGN_OR_RETURN(vm.ledger, domain::ReadLedger(dir, vm_uuid));
  for (const LedgerSnapshot::Row& row : vm.ledger.rows) {
    vm.kernel.push_back(row.liveness == Liveness::kAlive ? domain::KernelCountersOf(row.owner)
                                                         : std::nullopt);
  }
  vm.problems = domain::ProblemsOf(vm.ledger);
  return vm;
}

nlohmann::json CacheJson(const domain::CacheFigures& cache) {
  return {{"cached_pages", cache.cached_pages},     {"cached_bytes", BytesOf(cache.cached_pages)},
          {"idle_pages", cache.idle_pages},         {"idle_bytes", BytesOf(cache.idle_pages)},
          {"hit_pages", cache.hit_pages},           {"miss_pages", cache.miss_pages},
          {"map_calls", cache.map_calls},           {"mapper_calls", cache.mapper_calls},
          {"unmapped_pages", cache.unmapped_pages}, {"revocations", cache.revocations},
          {"revoked_pages", cache.revoked_pages},   {"moved_pages", cache.moved_pages},
          {"evicted_pages", cache.evicted_pages}};
}

nlohmann::json DomainJson(const LedgerSnapshot::Row& row,
                          const std::optional<KernelCounters>& kernel) {
  nlohmann::json json = {{"row", row.index},
                         {"name", row.name},
                         {"kind", domain::DomainKindName(row.kind)},
                         {"pid", row.owner.pid},
                         {"state", StateName(row.liveness)},
                         {"registered", row.is_registered},
                         {"pin_backend", row.pin_backend},
                         {"granule_pages", row.granule_pages},
                         {"mapped_pages", row.mapped_pages},
                         {"pinned_pages", row.pinned_pages},
                         {"unique_pages", row.unique_pages},
                         {"charged_pages", row.charged_pages},
                         {"locked_pages", row.locked_pages},
                         {"locked_areas", row.locked_areas},
                         {"area_budget", row.area_budget},
                         {"unlisted_mappings", row.unlisted_mappings},
                         {"dma_cache", CacheJson(row.cache)},
                         {"percent_of_mapped", nullptr},
                         {"kernel", nullptr}};
  if (const auto percent = PercentOfMapped(row)) json["percent_of_mapped"] = *percent;
  if (kernel) json["kernel"] = {{"vm_lck_kb", kernel->vm_lck_kb}, {"vm_pin_kb", kernel->vm_pin_kb}};
  return json;
}

nlohmann::json VmJson(const AuditReport::Vm& vm) {
  nlohmann::json domains = nlohmann::json::array();
  for (size_t i = 0; i < vm.ledger.rows.size(); ++i) {
    domains.push_back(DomainJson(vm.ledger.rows[i], vm.kernel[i]));
  }
  nlohmann::json files = nlohmann::json::array();
  for (const LedgerSnapshot::File& file : vm.ledger.files) {
    files.push_back({{"device", file.identity.device},
                     {"inode", file.identity.inode},
                     {"pages", file.pages},
                     {"unique_pages", file.unique_pages}});
  }
  return {
      {"vm", vm.ledger.vm_uuid},
      {"ledger", vm.ledger.path},
      {"consistent", vm.problems.empty()},
      {"in_motion", vm.ledger.in_motion},
      {"repairs", vm.ledger.repairs},
      {"problems", vm.problems},
      {"totals",
       {{"unique_pages", vm.ledger.unique_pages}, {"charged_pages", vm.ledger.charged_pages()}}},
      {"domains", std::move(domains)},
      {"files", std::move(files)}};
}

}  // namespace

Result<AuditReport> Audit(const std::string& runtime_dir,
                          const std::optional<std::string>& vm_uuid) {
  AuditReport report;
  report.runtime_dir = runtime_dir;
  report.only_vm = vm_uuid;
  auto dir = domain::RuntimeDir::OpenForReading(runtime_dir);
  if (!dir && dir.error().sys_errno() == ENOENT) return report;
  if (!dir) return tl::unexpected<Error>(std::move(dir).error());
  std::vector<std::string> uuids;
  if (vm_uuid) {
    uuids.push_back(*vm_uuid);
  } else {
    MVGPU_ASSIGN_OR_RETURN(uuids, dir->ledgers());
  }
  for (const std::string& uuid : uuids) {
    auto vm = ReadVm(*dir, uuid);
    if (vm) {
      report.vms.push_back(std::move(*vm));
    } else if (vm.error().sys_errno() !=
               ENOENT) {  // ENOENT: the VM has ended, or there never was one
      report.unreadable.push_back({uuid, std::move(vm).error()});
    }
  }
  return report;
}

std::string RenderText(const AuditReport& report, const AuditReport* before) {
  std::string text;
  for (const AuditReport::Vm& vm : report.vms) {
    if (!text.empty()) text += '\n';
    RenderVm(std::back_inserter(text), vm,
             before == nullptr ? nullptr : Find(*before, vm.ledger.vm_uuid));
  }
  if (report.vms.empty() && report.unreadable.empty()) {
    text = fmt::format("{} a ledger in {}\n",
                       report.only_vm ? "vm " + *report.only_vm + " does not have" : "no VM has",
                       report.runtime_dir);
  }
  if (before != nullptr) RenderEnded(std::back_inserter(text), *before, report);
  return text;
}

nlohmann::json ErrorsJson(const AuditReport& report) {
  nlohmann::json errors = nlohmann::json::array();
  for (const AuditReport::Unreadable& unreadable : report.unreadable) {
    errors.push_back({{"vm", unreadable.vm_uuid},
                      {"error",
                       {{"code", ErrorCodeName(unreadable.error.code())},
                        {"message", unreadable.error.message()}}}});
  }
  return errors;
}

nlohmann::json ToJson(const AuditReport& report) {
  nlohmann::json vms = nlohmann::json::array();
  for (const AuditReport::Vm& vm : report.vms) vms.push_back(VmJson(vm));
  return {{"runtime_dir", report.runtime_dir},
          {"page_size", kPageSize},
          {"vms", std::move(vms)},
          {"errors", ErrorsJson(report)}};
}

}  // namespace mvgpu::backend
