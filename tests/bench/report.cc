#include "tests/bench/report.h"

#include <fmt/format.h>
#include <sys/utsname.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>

namespace mvgpu::bench {

namespace {

constexpr char kLine[] = "{:<58} {:>8} {:>8} {:>8} {:>9} {:>4} {:>10} {:>10}  {}\n";

std::string TargetText(const Target& target) {
  switch (target.kind) {
    case Target::Kind::kNone:
      return "-";
    case Target::Kind::kAtMost:
      return fmt::format("<= {:g}", target.value);
    case Target::Kind::kAtLeast:
      return fmt::format(">= {:g}", target.value);
  }
  return "";
}

std::string FigureText(double figure) {
  return figure >= 1000 ? fmt::format("{:.0f}", figure) : fmt::format("{:.3f}", figure);
}

std::string NsText(double ns) { return ns == 0 ? "-" : fmt::format("{:.2f}", ns); }

std::string OkText(const Row& row) {
  if (row.failure.empty() && row.target.kind == Target::Kind::kNone) return "-";
  return row.meets_target() ? "yes" : "NO";
}

nlohmann::json RowJson(const Row& row) {
  nlohmann::json json = {{"name", row.name}, {"against", row.against}, {"ok", row.meets_target()}};
  json["target"] = nullptr;
  if (row.target.kind != Target::Kind::kNone) {
    const bool at_most = row.target.kind == Target::Kind::kAtMost;
    json["target"] = {{at_most ? "at_most" : "at_least", row.target.value}};
  }
  if (!row.failure.empty()) {
    json["failure"] = row.failure;
    return json;
  }
  json["unit"] = row.unit;
  json["median"] = row.median;
  json["min"] = row.min;
  json["max"] = row.max;
  if (row.ours_ns != 0) {
    json["ours_ns"] = row.ours_ns;
    json["baseline_ns"] = row.baseline_ns;
  }
  return json;
}

}  // namespace

Machine Machine::Here() {
  Machine machine;
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; machine.cpu_model.empty() && std::getline(cpuinfo, line);) {
    const size_t colon = line.find(": ");
    if (line.starts_with("model name") && colon != std::string::npos) {
      machine.cpu_model = line.substr(colon + 2);
    }
  }
  utsname names = {};
  if (uname(&names) == 0) machine.kernel = fmt::format("{} {}", names.sysname, names.release);
  machine.cores = std::thread::hardware_concurrency();
  return machine;
}

std::string Heading(const Settings& settings, const Machine& machine) {
  return fmt::format(
             "{}, {} cores, {}; {} MiB of guest memory, medians of {} rounds; x: ours divided by "
             "the baseline of the same round, with a target >= the reverse\n",
             machine.cpu_model, machine.cores, machine.kernel, settings.memory >> 20,
             settings.repetitions) +
         fmt::format(kLine, "case", "median", "min", "max", "target", "ok", "ours ns", "base ns",
                     "unit, baseline");
}

std::string LineOf(const Row& row) {
  if (!row.failure.empty()) {
    return fmt::format(kLine, row.name, "-", "-", "-", TargetText(row.target), OkText(row), "-",
                       "-", row.failure);
  }
  return fmt::format(kLine, row.name, FigureText(row.median), FigureText(row.min),
                     FigureText(row.max), TargetText(row.target), OkText(row), NsText(row.ours_ns),
                     NsText(row.baseline_ns), row.unit + ", " + row.against);
}

std::string JsonOf(std::string_view table, const Settings& settings, const Machine& machine,
                   const std::vector<Row>& rows) {
  nlohmann::json json = {
      {"table", table},
      {"machine",
       {{"cpu_model", machine.cpu_model}, {"kernel", machine.kernel}, {"cores", machine.cores}}},
      {"memory_bytes", settings.memory},
      {"repetitions", settings.repetitions},
      {"quick", settings.quick},
      {"rows", nlohmann::json::array()}};
  for (const Row& row : rows) json["rows"].push_back(RowJson(row));
  return json.dump(2);
}

}  // namespace mvgpu::bench
