#include "backend/audit/repair.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cerrno>
#include <nlohmann/json.hpp>
#include <utility>

#include "apionly-domain/accounting/ledger_file.h"
#include "apionly-domain/accounting/process_info.h"
#include "apionly-domain/accounting/runtime_dir.h"
#include "backend/audit/accounts.h"
#include "backend/audit/console.h"

namespace mvgpu::backend {

using domain::LedgerSnapshot;
using domain::Liveness;

namespace {

bool HasDeadRow(const LedgerSnapshot& ledger) {
  return std::any_of(ledger.rows.begin(), ledger.rows.end(), [](const LedgerSnapshot::Row& row) {
    return row.liveness == Liveness::kDead;
  });
}

const LedgerSnapshot::Row* Find(const LedgerSnapshot& ledger, const LedgerSnapshot::Row& row) {
  for (const LedgerSnapshot::Row& other : ledger.rows) {
    if (other.index == row.index && other.owner == row.owner) return &other;
  }
  return nullptr;
}

void TellDropped(const LedgerSnapshot& before, const LedgerSnapshot& after,
                 std::vector<RepairStep>& steps) {
  for (const LedgerSnapshot::Row& row : before.rows) {
    const LedgerSnapshot::Row* left = Find(after, row);
    if (row.liveness == Liveness::kDead && left == nullptr) {
      steps.push_back(
          {RepairStep::Kind::kDroppedRow, before.vm_uuid, row, 0,
           fmt::format("dropped row {} ({}) of process {}, which is dead: it held {} "
                       "pages and paid for {}",
                       row.index, row.name, row.owner.pid, row.unique_pages, row.charged_pages)});
    }
    if (left == nullptr || left->charged_pages <= row.charged_pages) continue;
    const uint64_t moved = left->charged_pages - row.charged_pages;
    steps.push_back({RepairStep::Kind::kChargeMoved, before.vm_uuid, row, moved,
                     fmt::format("row {} ({}) pays for {} pages more: {}", row.index, row.name,
                                 moved, left->charged_pages)});
  }
}

// One VM's ledger, and what to do with it.
class Upkeep {
 public:
  Upkeep(const domain::RuntimeDir& dir, domain::LedgerFile file, const LedgerSnapshot& before)
      : dir_(dir), file_(std::move(file)), before_(before) {}

  static Result<std::vector<RepairStep>> Run(const std::string& runtime_dir,
                                             const LedgerSnapshot& before, bool remove,
                                             bool may_refuse) {
    MVGPU_ASSIGN_OR_RETURN(const domain::ProcessId self, domain::CurrentProcess());
    MVGPU_ASSIGN_OR_RETURN(domain::RuntimeDir dir, domain::RuntimeDir::OpenForReading(runtime_dir));
    MVGPU_ASSIGN_OR_RETURN(const domain::RuntimeDir again,
                           domain::RuntimeDir::OpenForReading(runtime_dir));
    Upkeep upkeep(again, domain::LedgerFile(std::move(dir), before.vm_uuid, self), before);
    MVGPU_ASSIGN_OR_RETURN(const UniqueFd locked, upkeep.file_.LockDirectory());
    if (remove) {
      MVGPU_ASSIGN_OR_RETURN(const bool removed, upkeep.Remove(may_refuse));
      if (removed) return std::move(upkeep.steps_);
    }
    if (HasDeadRow(before)) MVGPU_RETURN_IF_ERROR(upkeep.DropDead());
    return std::move(upkeep.steps_);
  }

 private:
  Result<bool> Remove(bool may_refuse) {
    auto removed = file_.RemoveUnused();
    if (removed) {
      steps_.push_back({RepairStep::Kind::kRemoved, before_.vm_uuid, std::nullopt, 0,
                        fmt::format("removed {}, which nobody used: {} rows of dead processes",
                                    before_.path, before_.rows.size())});
      return true;
    }
    if (removed.error().code() != ErrorCode::kBusy) {
      return tl::unexpected<Error>(std::move(removed).error());
    }
    if (may_refuse) {
      steps_.push_back({RepairStep::Kind::kRefused, before_.vm_uuid, std::nullopt, 0,
                        removed.error().message()});
    }
    return false;
  }

  Result<void> DropDead() {
    MVGPU_RETURN_IF_ERROR(file_.DropDead());
    MVGPU_ASSIGN_OR_RETURN(const LedgerSnapshot after, domain::ReadLedger(dir_, before_.vm_uuid));
    TellDropped(before_, after, steps_);
    return {};
  }

  const domain::RuntimeDir& dir_;
  const domain::LedgerFile file_;
  const LedgerSnapshot& before_;
  std::vector<RepairStep> steps_;
};

std::string_view KindName(RepairStep::Kind kind) {
  switch (kind) {
    case RepairStep::Kind::kDroppedRow:
      return "dropped_row";
    case RepairStep::Kind::kChargeMoved:
      return "charge_moved";
    case RepairStep::Kind::kRemoved:
      return "removed";
    case RepairStep::Kind::kRefused:
      break;
  }
  return "refused";
}

std::string RenderText(const std::vector<RepairStep>& steps) {
  if (steps.empty()) return "nothing to do\n";
  std::string text;
  for (const RepairStep& step : steps) {
    text += fmt::format("vm {}: {}\n", step.vm_uuid, step.message);
  }
  return text;
}

}  // namespace

CLI::App* RepairOptions::add_to(CLI::App& app) {
  CLI::App* const verb =
      app.add_subcommand("repair", "Drop what dead processes left in the ledgers");
  verb->footer(
      "Rows of dead processes go, as they would when the next domain joins; pages that others hold "
      "too\nare charged to them from then on. Rows of the living stay. A ledger that is damaged or "
      "of another\nversion is left alone.\n\n"
      "Exit codes:\n"
      "  0  done, or nothing was to be done\n"
      "  1  --remove: the ledger of the VM that --vm names is in use\n"
      "  2  wrong usage\n"
      "  3  the VM that --vm names has no ledger\n"
      "  4  a ledger or the runtime directory could not be read or changed, or stdout not be "
      "written");
  ledgers.add_to(*verb);
  verb->add_flag("--remove", remove, "also remove ledgers that nobody alive uses");
  verb->add_flag("--json", json, "one JSON object instead of lines");
  return verb;
}

nlohmann::json ToJson(const std::vector<RepairStep>& steps) {
  nlohmann::json actions = nlohmann::json::array();
  for (const RepairStep& step : steps) {
    nlohmann::json action = {
        {"vm", step.vm_uuid}, {"action", KindName(step.kind)}, {"message", step.message}};
    if (step.row) {
      action["row"] = step.row->index;
      action["name"] = step.row->name;
      action["pid"] = step.row->owner.pid;
    }
    if (step.kind == RepairStep::Kind::kDroppedRow) {
      action["unique_pages"] = step.row->unique_pages;
      action["charged_pages"] = step.row->charged_pages;
    }
    if (step.kind == RepairStep::Kind::kChargeMoved) action["moved_pages"] = step.moved_pages;
    actions.push_back(std::move(action));
  }
  return actions;
}

int Repair(const RepairOptions& options) {
  auto report = ReadAccounts(options.ledgers);
  if (!report) return report.error();
  std::vector<RepairStep> all;
  for (const AuditReport::Vm& vm : report->vms) {
    auto steps =
        Upkeep::Run(report->runtime_dir, vm.ledger, options.remove, report->only_vm.has_value());
    if (!steps && steps.error().sys_errno() == ENOENT) continue;  // the VM has just ended
    if (!steps) {
      report->unreadable.push_back({vm.ledger.vm_uuid, std::move(steps).error()});
      continue;
    }
    std::move(steps->begin(), steps->end(), std::back_inserter(all));
  }
  const bool is_refused = std::any_of(all.begin(), all.end(), [](const RepairStep& step) {
    return step.kind == RepairStep::Kind::kRefused;
  });
  std::string text = all.empty() && !report->unreadable.empty() ? "" : RenderText(all);
  if (options.json) {
    const nlohmann::json json = {{"runtime_dir", report->runtime_dir},
                                 {"actions", ToJson(all)},
                                 {"errors", ErrorsJson(*report)}};
    text = json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  }
  return Answer(text, *report, is_refused ? kAuditProblem : kAuditOk);
}

}  // namespace mvgpu::backend
