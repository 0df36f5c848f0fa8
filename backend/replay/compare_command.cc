#include "backend/replay/compare_command.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <utility>

#include <nlohmann/json.hpp>

#include "backend/cli_options.h"
#include "backend/policies/dma_text_import.h"
#include "backend/policies/session_import.h"
#include "backend/policies/workloads.h"
#include "backend/trace/trace_format.h"

namespace mvgpu::backend {

namespace {

using nlohmann::json;

constexpr std::string_view kPublished = "published";
// After it the policies with a clock have looked at every page twice.
constexpr std::chrono::seconds kWarmUp = 2 * PinningPolicy::kPeriod;

Result<DmaTrace> LoadSession(const CompareOptions& options, TraceReader* reader) {
  if (options.memory != 0) {
    return Fail(ErrorCode::kInvalid,
                reader->name() +
                    ": --memory means nothing here, a session's trace says what memory "
                    "its guest has");
  }
  return ImportSession(reader);
}

Result<DmaTrace> LoadFile(const CompareOptions& options) {
  // Not waited for and not read for ever: a FIFO, a device.
  std::error_code error;
  if (std::filesystem::exists(options.trace, error) &&
      !std::filesystem::is_regular_file(options.trace, error)) {
    return Fail(ErrorCode::kCorrupt,
                fmt::format("{} is not a regular file: write the trace into one", options.trace));
  }
  std::ifstream file(options.trace, std::ios::binary);
  if (!file) return FailSystem(errno, fmt::format("cannot open the trace {}", options.trace));
  std::string magic(kTraceMagic.size(), '\0');
  file.read(magic.data(), static_cast<std::streamsize>(magic.size()));
  if (file && magic == kTraceMagic) {
    MVGPU_ASSIGN_OR_RETURN(const auto reader, TraceReader::Open(options.trace));
    return LoadSession(options, reader.get());
  }
  file.clear();
  file.seekg(0);
  return ImportDmaText(file, options.trace, {options.memory});
}

uint64_t MiBOf(uint64_t pages) { return BytesIn(pages) >> 20; }
double MiBOf(double pages) { return pages / 256; }

json ToJson(const Compared& row, const DmaTrace& trace) {
  json object{{"policy", row.policy}, {"ok", row.figures.has_value()}};
  if (!row.figures) {
    object["error"] = {{"code", ErrorCodeName(row.figures.error().code())},
                       {"message", row.figures.error().message()}};
    return object;
  }
  const PolicyFigures& figures = *row.figures;
  object["peak_pinned_pages"] = figures.pins.peak_pages;
  object["peak_share"] =
      static_cast<double>(figures.pins.peak_pages) / static_cast<double>(trace.memory_pages());
  object["mean_pinned_pages"] = figures.mean_pinned_pages();
  object["notifications"] = figures.notifications;
  object["warm_maps"] = figures.warm_maps;
  object["warm_notifications"] = figures.warm_notifications;
  object["suppressed_share"] = figures.suppressed_share();
  object["pin_calls"] = figures.pins.pin_calls;
  object["unpin_calls"] = figures.pins.unpin_calls;
  object["pages_pinned"] = figures.pins.pages_pinned;
  object["repinned_pages"] = figures.pins.repinned_pages;
  object["mean_access_ns"] = figures.mean_access_ns;
  object["p99_access_ns"] = figures.p99_access_ns;
  return object;
}

struct Totals {
  uint64_t maps = 0;
  uint64_t accesses = 0;
  double seconds = 0;
};
Totals TotalsOf(const DmaTrace& trace) {
  Totals totals;
  for (const DmaEvent& event : trace.events) {
    totals.maps += event.kind == DmaEvent::Kind::kMap ? 1 : 0;
    totals.accesses += event.kind == DmaEvent::Kind::kAccess ? 1 : 0;
  }
  if (!trace.events.empty())
    totals.seconds = static_cast<double>(trace.events.back().time_ns) / 1e9;
  return totals;
}

}  // namespace

CLI::App* AddCompareCommand(CLI::App& app, CompareOptions& options) {
  CLI::App* compare = app.add_subcommand(
      "compare", "Show what pinning policies make of the same DMA, side by side");
  auto* trace = compare->add_option("TRACE", options.trace,
                                    "A session's trace, or text with the kernel's dma:*, iommu:* "
                                    "and intel_iommu:* events (default: the built-in session)");
  compare->footer(fmt::format("Text is what ftrace prints, trace-cmd report or perf script: {}",
                              kHowToRecordDma));
  compare
      ->add_option("--workload", options.workload,
                   "Instead of a trace: published (a 32 GiB server, as coIOMMU's authors describe)")
      ->excludes(trace)
      ->check(CLI::IsMember({std::string(kPublished)}));
  compare->add_option("--policy", options.policies,
                      fmt::format("Policies, separated by commas: {} (default: all)",
                                  fmt::join(PolicyNames(), ", ")));
  AddSize(*compare, "--memory", options.memory,
          "Memory of the guest, for text and workloads (default: what the text needs, 32G)");
  AddChoice<PinMode>(*compare, "--pin", options.pin, PinModes(),
                     "How pages are held: mlock, io-uring, none (default: none)");
  compare->add_flag("--json", options.as_json, "Print the report as one JSON object");
  return compare;
}

Result<DmaTrace> LoadDma(const CompareOptions& options,
                         const std::function<Result<std::unique_ptr<TraceReader>>()>& builtin) {
  if (!options.workload.empty()) {
    PublishedWorkload workload;
    if (options.memory != 0) workload.memory = options.memory;
    return MakePublishedWorkload(workload);
  }
  if (!options.trace.empty()) return LoadFile(options);
  MVGPU_ASSIGN_OR_RETURN(const auto reader, builtin());
  return LoadSession(options, reader.get());
}

Result<std::vector<Compared>> Compare(const CompareOptions& options, const DmaTrace& trace) {
  MVGPU_ASSIGN_OR_RETURN(const std::vector<std::string> names, ParsePolicyNames(options.policies));
  std::vector<Compared> rows;
  for (const std::string& name : names) {
    rows.push_back({name, [&]() -> Result<PolicyFigures> {
                      MVGPU_ASSIGN_OR_RETURN(auto backend, MakePinBackend(options.pin));
                      return RunPolicy(name, trace, std::move(backend), {kWarmUp});
                    }()});
  }
  return rows;
}

std::string CompareTable(const DmaTrace& trace, const std::vector<Compared>& rows, PinMode pin) {
  const Totals totals = TotalsOf(trace);
  std::string text = fmt::format(
      "{}\n  {} MiB of guest memory, {:.1f} s, {} maps, {} accesses of the device, pinned by {}\n",
      trace.name, MiBOf(trace.memory_pages()), totals.seconds, totals.maps, totals.accesses,
      PinModeName(pin));
  if (trace.skipped != 0) {
    text += fmt::format("  {} records of the trace name no memory that could be played\n",
                        trace.skipped);
  }
  for (const auto& [name, count] : trace.skipped_by_name) {
    text += fmt::format("  {:>10} {}\n", count, name);
  }
  if (trace.repeated != 0) {
    text += fmt::format("  {} records say again what others said, and are taken once\n",
                        trace.repeated);
  }
  text += fmt::format("\n  {:<12}{:>19}{:>9}{:>10}{:>9}{:>9}{:>10}{:>18}\n", "", "pinned, MiB", "",
                      "notifi-", "pin", "unpin", "pages", "us per access");
  text +=
      fmt::format("  {:<12}{:>10}{:>9}{:>9}{:>10}{:>9}{:>9}{:>10}{:>9}{:>9}\n", "policy", "at most",
                  "of all", "mean", "cations", "calls", "calls", "re-pinned", "mean", "p99");
  for (const Compared& row : rows) {
    if (!row.figures) {
      text += fmt::format("  {:<12}{}\n", row.policy, row.figures.error().message());
      continue;
    }
    const PolicyFigures& figures = *row.figures;
    const double peak = static_cast<double>(figures.pins.peak_pages);
    text +=
        fmt::format("  {:<12}{:>10.1f}{:>8.2f}%{:>9.1f}{:>10}{:>9}{:>9}{:>10}{:>9.2f}{:>9.2f}\n",
                    row.policy, MiBOf(peak), 100 * peak / static_cast<double>(trace.memory_pages()),
                    MiBOf(figures.mean_pinned_pages()), figures.notifications,
                    figures.pins.pin_calls, figures.pins.unpin_calls, figures.pins.repinned_pages,
                    figures.mean_access_ns / 1e3, static_cast<double>(figures.p99_access_ns) / 1e3);
  }
  return text;
}

std::string CompareJson(const DmaTrace& trace, const std::vector<Compared>& rows, PinMode pin) {
  const Totals totals = TotalsOf(trace);
  json policies = json::array();
  for (const Compared& row : rows) policies.push_back(ToJson(row, trace));
  const json report{{"trace", trace.name},
                    {"memory_pages", trace.memory_pages()},
                    {"seconds", totals.seconds},
                    {"maps", totals.maps},
                    {"accesses", totals.accesses},
                    {"skipped", trace.skipped},
                    {"skipped_by_name", trace.skipped_by_name},
                    {"repeated", trace.repeated},
                    {"pin", PinModeName(pin)},
                    {"policies", policies}};
  // File names need not be UTF-8.
  return report.dump(2, ' ', false, json::error_handler_t::replace) + "\n";
}

}  // namespace mvgpu::backend
