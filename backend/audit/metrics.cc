#include "backend/audit/metrics.h"

#include <fmt/format.h>

#include <array>
#include <cstdint>
#include <functional>
#include <iterator>
#include <set>
#include <string_view>
#include <utility>
#include <vector>

#include "apionly-domain/base/address.h"

namespace mvgpu::backend {

using domain::KernelCounters;
using domain::LedgerSnapshot;

namespace {

// Label values: a backslash, a quote and a line feed are escaped; nothing else may be.
std::string Escaped(std::string_view value) {
  std::string text;
  for (const char c : value) {
    if (c == '\\' || c == '"') text += '\\';
    if (c == '\n') {
      text += "\\n";
    } else {
      text += c;
    }
  }
  return text;
}

using Label = std::pair<std::string_view, std::string>;
using Labels = std::vector<Label>;

// One metric family after the other; the samples of a family stand together.
class Exposition {
 public:
  struct Family {
    std::string_view name;
    std::string_view type;
    std::string_view unit;  // the name ends with it, or empty
    std::string_view help;
  };

  void begin(const Family& family) {
    family_ = family;
    fmt::format_to(out_, "# TYPE {} {}\n", family.name, family.type);
    if (!family.unit.empty()) fmt::format_to(out_, "# UNIT {} {}\n", family.name, family.unit);
    fmt::format_to(out_, "# HELP {} {}\n", family.name, family.help);
  }
  void sample(const Labels& labels, uint64_t value) { Sample(labels, fmt::format("{}", value)); }
  // A ledger may say what it likes; readers have 64-bit floating point anyway.
  void sample_pages(const Labels& labels, uint64_t pages) {
    Sample(labels, fmt::format("{:.0f}", static_cast<double>(pages) * double{kPageSize}));
  }
  std::string end() && { return std::move(text_) + "# EOF\n"; }

 private:
  void Sample(const Labels& labels, const std::string& value) {
    text_ += family_.name;
    if (family_.type == "counter") text_ += "_total";
    char separator = '{';
    for (const auto& [name, label] : labels) {
      fmt::format_to(out_, "{}{}=\"{}\"", separator, name, Escaped(label));
      separator = ',';
    }
    if (!labels.empty()) text_ += '}';
    fmt::format_to(out_, " {}\n", value);
  }

  std::string text_;
  std::back_insert_iterator<std::string> out_{text_};
  Family family_;
};

Labels LabelsOf(const AuditReport::Vm& vm) { return {{"vm", vm.ledger.vm_uuid}}; }

Labels LabelsOf(const AuditReport::Vm& vm, const LedgerSnapshot::Row& row) {
  return {{"vm", vm.ledger.vm_uuid}, {"row", fmt::format("{}", row.index)}, {"domain", row.name}};
}

using RowVisitor = std::function<void(const AuditReport::Vm&, const LedgerSnapshot::Row&)>;
void ForEachRow(const AuditReport& report, const RowVisitor& visit) {
  for (const AuditReport::Vm& vm : report.vms) {
    for (const LedgerSnapshot::Row& row : vm.ledger.rows) visit(vm, row);
  }
}

void RenderDomains(Exposition& out, const AuditReport& report) {
  out.begin({"mvgpu_domain_info", "gauge", "", "A row of a ledger; always 1."});
  ForEachRow(report, [&out](const auto& vm, const auto& row) {
    Labels labels = LabelsOf(vm, row);
    labels.emplace_back("kind", domain::DomainKindName(row.kind));
    labels.emplace_back("pin_backend", row.pin_backend);
    labels.emplace_back("pid", fmt::format("{}", row.owner.pid));
    out.sample(labels, 1);
  });
  out.begin(
      {"mvgpu_domain_state", "gauge", "", "1 for the state that the domain's process is in."});
  ForEachRow(report, [&out](const auto& vm, const auto& row) {
    for (const auto state :
         {domain::Liveness::kAlive, domain::Liveness::kDead, domain::Liveness::kUnknown}) {
      Labels labels = LabelsOf(vm, row);
      labels.emplace_back("state", StateName(state));
      out.sample(labels, row.liveness == state ? 1 : 0);
    }
  });
}

void RenderCaches(Exposition& out, const AuditReport& report) {
  using Cache = domain::CacheFigures;
  struct Figure {
    std::string_view name;
    std::string_view help;
    uint64_t Cache::*value;
  };
  static constexpr std::array kNow = {
      Figure{"mvgpu_dma_cache_bytes", "Mapped for the device, in use or idle.",
             &Cache::cached_pages},
      Figure{"mvgpu_dma_cache_idle_bytes", "Of these, used by nobody.", &Cache::idle_pages},
  };
  for (const Figure& figure : kNow) {
    out.begin({figure.name, "gauge", "bytes", figure.help});
    ForEachRow(report, [&](const auto& vm, const auto& row) {
      out.sample_pages(LabelsOf(vm, row), row.cache.*figure.value);
    });
  }
  static constexpr std::array kEver = {
      Figure{"mvgpu_dma_cache_hit_pages", "Asked for and there.", &Cache::hit_pages},
      Figure{"mvgpu_dma_cache_miss_pages", "Pinned and mapped.", &Cache::miss_pages},
      Figure{"mvgpu_dma_cache_map_calls", "Ranges and batches asked for, and got.",
             &Cache::map_calls},
      Figure{"mvgpu_dma_cache_mapper_calls", "Calls of the mapper to map.", &Cache::mapper_calls},
      Figure{"mvgpu_dma_cache_unmapped_pages", "Unmapped, for whatever reason.",
             &Cache::unmapped_pages},
      Figure{"mvgpu_dma_cache_revoked_pages", "Taken away by the VMM, or moved.",
             &Cache::revoked_pages},
      Figure{"mvgpu_dma_cache_moved_pages", "Of those revoked, moved by the kernel.",
             &Cache::moved_pages},
      Figure{"mvgpu_dma_cache_revocations", "Users told that pages were taken away.",
             &Cache::revocations},
      Figure{"mvgpu_dma_cache_evicted_pages", "Idle pages that went for others.",
             &Cache::evicted_pages},
  };
  for (const Figure& figure : kEver) {
    const bool is_pages = figure.name.ends_with("_pages");
    out.begin({figure.name, "counter", is_pages ? "pages" : "", figure.help});
    ForEachRow(report, [&](const auto& vm, const auto& row) {
      out.sample(LabelsOf(vm, row), row.cache.*figure.value);
    });
  }
}

void RenderDomainFigures(Exposition& out, const AuditReport& report) {
  using Row = LedgerSnapshot::Row;
  struct Figure {
    std::string_view name;
    std::string_view help;
    uint64_t Row::*pages;
  };
  static constexpr std::array kFigures = {
      Figure{"mvgpu_domain_mapped_bytes", "Mapped in the container, with a file behind.",
             &Row::mapped_pages},
      Figure{"mvgpu_domain_pinned_bytes", "Sum over all pins: what is pinned twice counts twice.",
             &Row::pinned_pages},
      Figure{"mvgpu_domain_unique_bytes", "Held, every page of a file once.", &Row::unique_pages},
      Figure{"mvgpu_domain_charged_bytes", "Held and paid for by this domain.",
             &Row::charged_pages},
      Figure{"mvgpu_domain_locked_bytes", "What the kernel was asked to hold, whole granules.",
             &Row::locked_pages},
  };
  for (const Figure& figure : kFigures) {
    out.begin({figure.name, "gauge", "bytes", figure.help});
    ForEachRow(report, [&](const auto& vm, const auto& row) {
      out.sample_pages(LabelsOf(vm, row), row.*figure.pages);
    });
  }
  RenderCaches(out, report);
  out.begin({"mvgpu_domain_locked_areas", "gauge", "", "Separate locked stretches of memory."});
  ForEachRow(report, [&out](const auto& vm, const auto& row) {
    out.sample(LabelsOf(vm, row), row.locked_areas);
  });
  out.begin({"mvgpu_domain_area_budget", "gauge", "", "Most locked stretches; 0 for no limit."});
  ForEachRow(report, [&out](const auto& vm, const auto& row) {
    out.sample(LabelsOf(vm, row), row.area_budget);
  });
}

// Once per process: the kernel does not know of domains.
void RenderProcesses(Exposition& out, const AuditReport& report) {
  struct Figure {
    std::string_view name;
    std::string_view help;
    uint64_t KernelCounters::*kilobytes;
  };
  static constexpr std::array kFigures = {
      Figure{"mvgpu_process_locked_bytes", "What the kernel counts as VmLck.",
             &KernelCounters::vm_lck_kb},
      Figure{"mvgpu_process_pinned_bytes", "What the kernel counts as VmPin.",
             &KernelCounters::vm_pin_kb},
  };
  for (const Figure& figure : kFigures) {
    out.begin({figure.name, "gauge", "bytes", figure.help});
    for (const AuditReport::Vm& vm : report.vms) {
      std::set<uint32_t> seen;
      for (size_t i = 0; i < vm.ledger.rows.size(); ++i) {
        const uint32_t pid = vm.ledger.rows[i].owner.pid;
        if (!vm.kernel[i] || !seen.insert(pid).second) continue;
        Labels labels = LabelsOf(vm);
        labels.emplace_back("pid", fmt::format("{}", pid));
        out.sample(labels, *vm.kernel[i].*figure.kilobytes * 1024);
      }
    }
  }
}

void RenderVms(Exposition& out, const AuditReport& report) {
  out.begin({"mvgpu_vm_unique_bytes", "gauge", "bytes", "Held by any domain, every page once."});
  for (const AuditReport::Vm& vm : report.vms) {
    out.sample_pages(LabelsOf(vm), vm.ledger.unique_pages);
  }
  out.begin({"mvgpu_vm_charged_bytes", "gauge", "bytes", "Sum of what the domains pay for."});
  for (const AuditReport::Vm& vm : report.vms) {
    out.sample_pages(LabelsOf(vm), vm.ledger.charged_pages());
  }
  out.begin({"mvgpu_ledger_problems", "gauge", "", "Invariants that the ledger breaks."});
  for (const AuditReport::Vm& vm : report.vms) out.sample(LabelsOf(vm), vm.problems.size());
  out.begin({"mvgpu_ledger_in_motion", "gauge", "", "1 if figures changed while being read."});
  for (const AuditReport::Vm& vm : report.vms) out.sample(LabelsOf(vm), vm.ledger.in_motion);
  out.begin({"mvgpu_ledger_repairs", "counter", "", "Repairs after processes that died."});
  for (const AuditReport::Vm& vm : report.vms) out.sample(LabelsOf(vm), vm.ledger.repairs);
  out.begin({"mvgpu_ledgers", "gauge", "", "Ledgers that were read."});
  out.sample({}, report.vms.size());
  out.begin({"mvgpu_ledgers_unreadable", "gauge", "", "Ledgers that could not be read."});
  out.sample({}, report.unreadable.size());
}

}  // namespace

std::string RenderMetrics(const AuditReport& report) {
  Exposition out;
  RenderDomains(out, report);
  RenderDomainFigures(out, report);
  RenderProcesses(out, report);
  RenderVms(out, report);
  return std::move(out).end();
}

}  // namespace mvgpu::backend
