// mvgpu-bench: what mvgpu costs, next to what the machine and others can do, as a table of ratios.

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <map>
#include <string>
#include <utility>

#include "tests/bench/accounts_table.h"
#include "tests/bench/cache_table.h"
#include "tests/bench/domain_table.h"
#include "tests/bench/harness.h"
#include "tests/bench/report.h"
#include "tests/bench/seeds_table.h"

namespace mvgpu::bench {
namespace {

constexpr int kExitUsage = 2;
constexpr uint64_t kFewestRepetitions = 9;
constexpr char kExitCodes[] =
    "Exit codes: 0 measured, whether targets are met or not; 2 wrong arguments.";

struct Options {
  std::string table = "domain";
  bool json = false;
  Settings settings;
};

using Measure = void (*)(Table*);
const std::map<std::string, Measure>& Tables() {
  static const std::map<std::string, Measure> tables = {{"domain", MeasureDomain},
                                                        {"cache", MeasureCache},
                                                        {"accounts", MeasureAccounts},
                                                        {"seeds", MeasureSeeds}};
  return tables;
}

int Run(const Options& options) {
  const Machine machine = Machine::Here();
  bool is_first = true;
  Table table(options.settings, [&](const Row& row) {
    if (options.json) return;
    if (std::exchange(is_first, false)) fmt::print("{}", Heading(options.settings, machine));
    fmt::print("{}", LineOf(row));
    std::fflush(stdout);
  });
  Tables().at(options.table)(&table);
  if (table.rows().empty()) {
    fmt::print(stderr, "mvgpu-bench: --rows: no row of table {} has '{}' in its name\n",
               options.table, options.settings.rows);
    return kExitUsage;
  }
  if (options.json) {
    fmt::print("{}\n", JsonOf(options.table, options.settings, machine, table.rows()));
  }
  return 0;
}

int Main(int argc, char** argv) {
  CLI::App app("Measures mvgpu against limits of the machine and methods of others", "mvgpu-bench");
  app.footer(kExitCodes);
  Options options;
  app.add_option("--table", options.table, "which table")
      ->check(CLI::IsMember(&Tables()))
      ->capture_default_str();
  app.add_flag("--json", options.json, "one JSON object instead of a table");
  app.add_option("--rows", options.settings.rows, "only rows with this in their names")
      ->type_name("SUBSTRING");
  app.add_option("--repetitions", options.settings.repetitions,
                 "rounds, of which medians are taken")
      ->check(CLI::Range(kFewestRepetitions, uint64_t{1000}))
      ->capture_default_str();
  app.add_flag("--quick", options.settings.quick,
               "1 GiB of memory, 3 rounds, little work: to see that all rows run");
  // The library reports everything, --help included, by throwing.
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& request) {
    return app.exit(request);
  } catch (const CLI::ParseError& error) {
    fmt::print(stderr, "mvgpu-bench: {}; see mvgpu-bench --help\n", error.what());
    return kExitUsage;
  }
  if (options.settings.quick) {
    options.settings.memory = uint64_t{1} << 30;
    options.settings.repetitions = 3;
  }
  return Run(options);
}

}  // namespace
}  // namespace mvgpu::bench

int main(int argc, char** argv) { return mvgpu::bench::Main(argc, argv); }
