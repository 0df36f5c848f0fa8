// mvgpu-replay: runs a recorded session of a guest without a VMM, through the same code.

#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include <nlohmann/json.hpp>

#include "backend/cli_options.h"
#include "backend/replay/compare_command.h"
#include "backend/replay/player.h"
#include "backend/scenario/scenario_file.h"
#include "backend/scenario/scenario_run.h"
#include "backend/trace/embedded_trace.h"
#include "backend/trace/trace_json.h"
#include "backend/trace/trace_reader.h"

namespace mvgpu::backend {
namespace {

using nlohmann::json;

// Part of the contract; in --help.
enum class ExitCode : int { kOk = 0, kDiffers = 1, kUsage = 2, kFailure = 3 };

struct RunOptions {
  RunOptions() { vgpu.pin = PinMode::kNone; }

  std::string trace;  // empty: the built-in one
  std::string screenshot;
  std::string pages;
  VgpuConfig vgpu;                         // of it, what a trace does not say
  std::optional<uint64_t> dma_idle_bytes;  // nullopt: as the trace says
  bool as_json = false;
};

Result<std::unique_ptr<TraceReader>> OpenTrace(const std::string& path) {
  if (path.empty()) return TraceReader::FromBytes(EmbeddedTrace(), std::string(kEmbeddedTraceName));
  return TraceReader::Open(path);
}

// One line that is drawn again and again; only on a terminal.
class ProgressBar {
 public:
  explicit ProgressBar(const TraceReader* reader)
      : reader_(*reader), is_shown_(isatty(STDERR_FILENO) != 0) {}
  ~ProgressBar() {
    if (is_shown_) fmt::print(stderr, "\r\033[K");
  }
  void draw() {
    const auto percent =
        static_cast<int>(reader_.bytes_read() * 100 / std::max<uint64_t>(1, reader_.bytes_total()));
    if (!is_shown_ || percent == last_) return;
    last_ = percent;
    fmt::print(stderr, "\rreplaying [{:<40}] {:3}%",
               std::string(static_cast<size_t>(percent) * 40 / 100, '#'), percent);
  }

 private:
  const TraceReader& reader_;  // outlives this
  const bool is_shown_;
  int last_ = -1;
};

// File names need not be UTF-8.
std::string Dump(const json& report) {
  return report.dump(2, ' ', false, json::error_handler_t::replace);
}

json ToJson(const std::string& name, const Player::Outcome& outcome, const Player& player) {
  json hashes = json::array();
  for (const uint64_t hash : outcome.frame_hashes) hashes.push_back(fmt::format("{:016x}", hash));
  json mapper = json::object();
  for (const auto& [figure, value] : outcome.mapper_figures) mapper[std::string(figure)] = value;
  return {
      {"trace", name},
      {"ok", outcome.differences == 0 && outcome.all_released},
      {"complete", outcome.is_complete},
      {"records", outcome.records},
      {"steps", outcome.steps},
      {"seconds", static_cast<double>(outcome.duration_ns) / 1e9},
      {"differences", outcome.differences},
      {"described", outcome.described},
      {"counters", json::parse(outcome.counters_json)},
      {"mapper", mapper},
      {"frame_hashes", hashes},
      {"pages_touched", player.pages().rows().size()},
      {"dma_idle_bytes", player.config().dma_idle_bytes},
      {"pins_compared", outcome.are_pins_compared},
      {"accounts", ToJson(player.recorded_accounts())},
      {"all_released", outcome.all_released},
  };
}

void PrintTable(const std::string& name, const Player::Outcome& outcome, const Player& player) {
  const json counters = json::parse(outcome.counters_json);
  const auto number = [&](const char* key) { return counters.value(key, uint64_t{0}); };
  const auto row = [](std::string_view what, const std::string& value) {
    fmt::print("  {:<36}{}\n", what, value);
  };
  fmt::print("{}\n", name);
  row("recorded",
      fmt::format("{:.1f} s, {} records{}", static_cast<double>(outcome.duration_ns) / 1e9,
                  outcome.records, outcome.is_complete ? "" : ", cut short"));
  row("commands (control, cursor, failed)",
      fmt::format("{}, {}, {}", number("control_commands"), number("cursor_commands"),
                  number("failed_commands")));
  row("frames", fmt::format("{}, last picture {}", number("frames"),
                            counters.value("final_picture", std::string())));
  row("bytes copied from the guest", fmt::format("{}", number("transferred_bytes")));
  row("guest pages touched", fmt::format("{}", player.pages().rows().size()));
  row("pages pinned (first, at most)",
      fmt::format("{} ({}, {})", number("pages_pinned"), number("pages_pinned_first"),
                  number("peak_unique_pages")));
  row("dma cache (hits, misses, unmapped)",
      fmt::format("{}, {}, {}", number("dma_hit_pages"), number("dma_miss_pages"),
                  number("dma_unmapped_pages")));
  row("dma maps, mapper calls",
      fmt::format("{}, {}", number("dma_map_calls"), number("dma_mapper_calls")));
  row("cached at most, idle at most",
      fmt::format("{} pages ({} bytes), {} ({} bytes)", number("dma_peak_cached_pages"),
                  number("dma_peak_cached_bytes"), number("dma_peak_idle_pages"),
                  number("dma_peak_idle_bytes")));
  row("revoked pages (users told), evicted",
      fmt::format("{} ({}), {}", number("dma_revoked_pages"), number("dma_revocations"),
                  number("dma_evicted_pages")));
  row("left behind", outcome.all_released ? "nothing" : "PINS OR MAPPINGS, see --json");
  row("as recorded", outcome.differences == 0
                         ? outcome.are_pins_compared
                               ? "yes: every answer, frame and count"
                               : "yes: every answer and frame; pins not, as --dma-idle is another"
                         : fmt::format("NO: {} differences", outcome.differences));
  for (const std::string& line : outcome.described) fmt::print("    {}\n", line);
}

int Fail(ExitCode code, const std::string& message) {
  fmt::print(stderr, "mvgpu-replay: {}\n", message);
  return static_cast<int>(code);
}

// A scenario brings its own memory and devices; of the options, only how pages are held is for it.
int RunScenario(const RunOptions& options) {
  if (!options.screenshot.empty() || !options.pages.empty() || options.dma_idle_bytes ||
      options.vgpu.dma != DmaMode::kNone) {
    return Fail(ExitCode::kUsage,
                fmt::format("{} is a scenario, which takes only --json and --pin", options.trace));
  }
  const auto text = scenario::ReadScenario(options.trace);
  if (!text) return Fail(ExitCode::kFailure, text.error().message());
  const auto steps = scenario::ParseScenario(options.trace, *text);
  if (!steps) return Fail(ExitCode::kFailure, steps.error().message());
  const scenario::Outcome outcome = scenario::RunSteps(*steps, options.vgpu.pin);
  if (options.as_json) {
    fmt::print("{}\n", scenario::OutcomeAsJson(options.trace, outcome));
  } else {
    scenario::PrintOutcome(options.trace, outcome);
  }
  return static_cast<int>(outcome.is_good() ? ExitCode::kOk : ExitCode::kDiffers);
}

int Run(const RunOptions& options) {
  if (scenario::IsScenario(options.trace)) return RunScenario(options);
  auto reader = OpenTrace(options.trace);
  if (!reader) return Fail(ExitCode::kFailure, reader.error().message());
  const VgpuConfig& vgpu = options.vgpu;
  auto player =
      Player::Create(reader->get(), {vgpu.pin, vgpu.dma, vgpu.iommu_group, vgpu.vulkan_device,
                                     vgpu.vfio_device, options.dma_idle_bytes});
  if (!player) return Fail(ExitCode::kFailure, player.error().message());
  Result<Player::Outcome> outcome = [&] {
    ProgressBar bar(reader->get());
    return (*player)->play([&bar] { bar.draw(); });
  }();
  if (!outcome) return Fail(ExitCode::kFailure, outcome.error().message());
  if (!options.screenshot.empty()) {
    if (auto saved = (*player)->picture().save_png(options.screenshot); !saved) {
      return Fail(ExitCode::kFailure, saved.error().message());
    }
  }
  if (!options.pages.empty()) {
    if (auto written = (*player)->pages().write_csv(options.pages); !written) {
      return Fail(ExitCode::kFailure, written.error().message());
    }
    if (!(*player)->pages().is_complete()) {
      fmt::print(stderr, "mvgpu-replay: {} has the first {} pages only\n", options.pages,
                 PageAccount::kMaxRows);
    }
  }
  if (options.as_json) {
    fmt::print("{}\n", Dump(ToJson((*reader)->name(), *outcome, **player)));
  } else {
    PrintTable((*reader)->name(), *outcome, **player);
  }
  return static_cast<int>(outcome->differences == 0 && outcome->all_released ? ExitCode::kOk
                                                                             : ExitCode::kDiffers);
}

// What is in a trace, without playing it.
int Info(const std::string& path, bool as_json) {
  auto reader = OpenTrace(path);
  if (!reader) return Fail(ExitCode::kFailure, reader.error().message());
  struct Tally {
    uint64_t records = 0;
    uint64_t bytes = 0;
  };
  std::map<TraceType, Tally> tallies;
  json session;
  json summary;
  uint64_t duration_ns = 0;
  while (true) {
    auto record = (*reader)->next();
    if (!record) return Fail(ExitCode::kFailure, record.error().message());
    if (!*record) break;
    ++tallies[(*record)->type].records;
    tallies[(*record)->type].bytes += (*record)->payload.size();
    duration_ns = (*record)->time_ns;
    ByteReader payload((*record)->payload);
    if ((*record)->type == TraceType::kSession)
      session = ParseTraceJson(payload.rest_as_text()).value_or(json());
    if ((*record)->type == TraceType::kSummary)
      summary = ParseTraceJson(payload.rest_as_text()).value_or(json());
  }
  if (as_json) {
    json records = json::object();
    for (const auto& [type, tally] : tallies) {
      records[std::string(TraceTypeName(type))] = {{"records", tally.records},
                                                   {"bytes", tally.bytes}};
    }
    const json report = {{"trace", (*reader)->name()},
                         {"file_bytes", (*reader)->bytes_total()},
                         {"seconds", static_cast<double>(duration_ns) / 1e9},
                         {"complete", !(*reader)->is_cut_short() && !summary.is_null()},
                         {"session", session},
                         {"summary", summary},
                         {"records", records}};
    fmt::print("{}\n", Dump(report));
    return 0;
  }
  fmt::print("{}: {} bytes, {:.1f} s{}\n", (*reader)->name(), (*reader)->bytes_total(),
             static_cast<double>(duration_ns) / 1e9, summary.is_null() ? ", cut short" : "");
  fmt::print("  {:<16}{:>10}{:>14}\n", "record", "count", "bytes");
  for (const auto& [type, tally] : tallies) {
    fmt::print("  {:<16}{:>10}{:>14}\n", TraceTypeName(type), tally.records, tally.bytes);
  }
  return 0;
}

// Exit code 1: some policy could not be played.
int RunCompare(const CompareOptions& options) {
  const auto trace = LoadDma(options, [] { return OpenTrace(""); });
  if (!trace) {
    const bool is_usage = trace.error().code() == ErrorCode::kInvalid;
    return Fail(is_usage ? ExitCode::kUsage : ExitCode::kFailure, trace.error().message());
  }
  const auto rows = Compare(options, *trace);
  if (!rows) return Fail(ExitCode::kUsage, rows.error().message());
  fmt::print("{}", options.as_json ? CompareJson(*trace, *rows, options.pin)
                                   : CompareTable(*trace, *rows, options.pin));
  const bool all_played = std::all_of(rows->begin(), rows->end(),
                                      [](const Compared& row) { return row.figures.has_value(); });
  return static_cast<int>(all_played ? ExitCode::kOk : ExitCode::kDiffers);
}

int Main(int argc, char** argv) {
  CLI::App app("Runs recorded guest GPU sessions without a VMM.", "mvgpu-replay");
  app.set_version_flag("--version", MVGPU_VERSION);
  app.require_subcommand(1);
  app.footer(
      "Exit codes: 0 as recorded, 1 something differs, was left behind or could not be played, 2 "
      "command line, 3 the trace cannot be read or a file cannot be written.");

  RunOptions run_options;
  CLI::App* run =
      app.add_subcommand("run", "Replay a trace and compare what comes out with what was recorded");
  run->add_option("TRACE", run_options.trace,
                  "Trace file (default: the built-in one), or a scenario in text");
  run->add_flag("--json", run_options.as_json, "Print the report as one JSON object");
  run->add_option("--screenshot", run_options.screenshot, "Write the last picture as PNG");
  run->add_option("--pages", run_options.pages, "Write what happened to each guest page as CSV");
  AddChoice<PinMode>(*run, "--pin", run_options.vgpu.pin, PinModes(),
                     "How pages are held: mlock, io-uring, none (default: none)");
  AddDmaOptions(*run, run_options.vgpu);
  AddIdleOption(*run, run_options.dma_idle_bytes, "as the trace says");

  std::string info_trace;
  bool info_json = false;
  CLI::App* info = app.add_subcommand("info", "Say what is in a trace");
  info->add_option("TRACE", info_trace, "Trace file (default: the built-in one)");
  info->add_flag("--json", info_json, "Print the report as one JSON object");

  CompareOptions compare_options;
  const CLI::App* compare = AddCompareCommand(app, compare_options);

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);  // --help, --version
    return Fail(ExitCode::kUsage, fmt::format("{}; see --help", error.what()));
  }
  if (compare->parsed()) return RunCompare(compare_options);
  return run->parsed() ? Run(run_options) : Info(info_trace, info_json);
}

}  // namespace
}  // namespace mvgpu::backend

int main(int argc, char** argv) { return mvgpu::backend::Main(argc, argv); }
