#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "backend/scenario/command.h"
#include "backend/scenario/scenario_file.h"
#include "backend/scenario/scenario_run.h"
#include "tests/backend/child_process.h"

namespace mvgpu::testing {

// The scenarios of the project; MVGPU_SCENARIOS is their folder.
inline std::vector<std::string> ScenarioNames() {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(MVGPU_SCENARIOS)) {
    if (entry.path().extension() == ".scenario") names.push_back(entry.path().stem());
  }
  std::sort(names.begin(), names.end());
  return names;
}
inline std::string ScenarioPath(const std::string& name) {
  return std::string(MVGPU_SCENARIOS) + "/" + name + ".scenario";
}
inline std::string ReadText(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}
inline void WriteText(const std::string& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}
// The first line, and what comes behind it.
inline std::string Scenario(const std::string& lines) { return "mvgpu scenario 1\n" + lines; }

inline Result<std::vector<backend::scenario::Step>> Parse(const std::string& text) {
  return backend::scenario::ParseScenario("s", text);
}
inline std::string ParseError(const std::string& text) {
  const auto steps = Parse(text);
  return steps ? "parsed" : steps.error().message();
}

struct RanReplay {
  std::optional<int> exit_code;
  std::string out;
  std::string err;
  nlohmann::json report() const { return nlohmann::json::parse(out, nullptr, false); }
};

inline RanReplay RunReplay(std::vector<std::string> arguments,
                           std::vector<std::string> environment = {}) {
  arguments.insert(arguments.begin(), MVGPU_REPLAY);
  ChildProcess process(ChildProcess::Options{.command = std::move(arguments),
                                             .environment = std::move(environment)});
  const auto code = process.wait();
  return {code, process.out(), process.err()};
}

}  // namespace mvgpu::testing
