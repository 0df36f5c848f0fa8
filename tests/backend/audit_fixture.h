#pragma once

#include <sys/wait.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>

#include "tests/apionly-domain/ledger_fixture.h"

namespace mvgpu::domain {

inline constexpr char kOtherVm[] = "ffffffff-0000-4000-8000-000000000001";

// Runs mvgpu-audit as its users do, on a runtime directory of its own.
class AuditFixture : public LedgerFixture {
 protected:
  struct Outcome {
    int exit_code = -1;
    std::string out;
    std::string err;
  };
  // `before` is shell text: "ulimit ...; ".
  Outcome Run(const std::string& arguments, const std::string& before = "") const {
    const std::string err_path = dir_ + "/stderr";
    FILE* pipe = popen((before + MVGPU_AUDIT + " " + arguments + " 2>" + err_path).c_str(), "r");
    Outcome outcome;
    char buffer[4096];
    while (size_t n = fread(buffer, 1, sizeof buffer, pipe)) outcome.out.append(buffer, n);
    const int status = pclose(pipe);
    if (WIFEXITED(status)) outcome.exit_code = WEXITSTATUS(status);
    std::ifstream err(err_path);
    outcome.err.assign(std::istreambuf_iterator<char>(err), {});
    return outcome;
  }
  Outcome Show(const std::string& options = "") const {
    return Run("show --runtime-dir=" + dir_ + " " + options);
  }
  static nlohmann::json JsonOf(const Outcome& outcome) {
    auto json = nlohmann::json::parse(outcome.out, nullptr, false);
    EXPECT_FALSE(json.is_discarded()) << outcome.out << outcome.err;
    return json;
  }
  nlohmann::json ShowJson(const std::string& options = "") const {
    return JsonOf(Show("--json " + options));
  }
  // The command line is refused with one line that has this text.
  void ExpectRefused(const std::string& arguments, const std::string& text) const {
    const Outcome outcome = Run(arguments);
    EXPECT_EQ(outcome.exit_code, 2) << arguments;
    EXPECT_THAT(outcome.err, ::testing::MatchesRegex("mvgpu-audit: [^\n]*\n")) << arguments;
    EXPECT_THAT(outcome.err, ::testing::HasSubstr(text)) << arguments;
    EXPECT_THAT(outcome.out, ::testing::IsEmpty()) << arguments;
  }
};

}  // namespace mvgpu::domain
