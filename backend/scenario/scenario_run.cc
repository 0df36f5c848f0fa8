#include "backend/scenario/scenario_run.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "backend/scenario/scenario_file.h"

namespace mvgpu::backend::scenario {

namespace {

// A refusal is an answer where one is expected; elsewhere the step has failed.
std::optional<Outcome::Failure> RunStep(const Step& step, World& world, Outcome::Done* done) {
  const auto result = step.command->run(world, step.arguments);
  done->answer = result ? *result : fmt::format("error {}", ErrorCodeName(result.error().code()));
  if (step.expected) {
    if (IsExpected(*step.expected, done->answer)) return std::nullopt;
    std::string got = done->answer;
    if (!result) got += fmt::format(" ({})", result.error().message());
    return Outcome::Failure{step.line, JoinWords(*step.expected), std::move(got)};
  }
  if (result) return std::nullopt;
  return Outcome::Failure{step.line, "no error",
                          fmt::format("{} ({})", done->answer, result.error().message())};
}

std::string LeftText(const World::Left& left) {
  if (left.is_nothing()) return "nothing";
  return fmt::format("{} PINNED, {} LOCKED, {} CHARGED PAGES, {} MAPPINGS", left.pinned_pages,
                     left.locked_pages, left.charged_pages, left.mappings);
}

}  // namespace

Outcome RunSteps(const std::vector<Step>& steps, PinMode pin) {
  Outcome outcome;
  World world(pin);
  for (const Step& step : steps) {
    Outcome::Done done{step.line, step.text, {}, step.expected.has_value(), true};
    outcome.failure = RunStep(step, world, &done);
    done.is_good = !outcome.failure;
    outcome.expectations += done.is_expectation ? 1 : 0;
    outcome.steps.push_back(std::move(done));
    if (outcome.failure) break;
  }
  outcome.left = world.end();
  return outcome;
}

void PrintOutcome(const std::string& name, const Outcome& outcome) {
  fmt::print("{}\n", name);
  for (const Outcome::Done& step : outcome.steps) {
    if (step.is_expectation) {
      fmt::print("{:>5}  {}{}\n", step.line, step.text, step.is_good ? "" : "   NO");
    } else {
      fmt::print("{:>5}  {:<52}  -> {}\n", step.line, step.text, step.answer);
    }
  }
  fmt::print("  steps           {}, of them expectations {}\n", outcome.steps.size(),
             outcome.expectations);
  if (outcome.failure) {
    fmt::print("  as expected     NO: {}:{}: expected {}, got {}\n", name, outcome.failure->line,
               outcome.failure->expected, outcome.failure->got);
  } else {
    fmt::print("  as expected     yes, all of it\n");
  }
  fmt::print("  left behind     {}\n", LeftText(outcome.left));
}

std::string OutcomeAsJson(const std::string& name, const Outcome& outcome) {
  using nlohmann::json;
  json steps = json::array();
  for (const Outcome::Done& step : outcome.steps) {
    steps.push_back({{"line", step.line},
                     {"step", step.text},
                     {"answer", step.answer},
                     {"expectation", step.is_expectation},
                     {"ok", step.is_good}});
  }
  json report = {{"scenario", name},
                 {"ok", outcome.is_good()},
                 {"expectations", outcome.expectations},
                 {"steps", steps},
                 {"failure", nullptr},
                 {"left",
                  {{"pinned_pages", outcome.left.pinned_pages},
                   {"locked_pages", outcome.left.locked_pages},
                   {"charged_pages", outcome.left.charged_pages},
                   {"mappings", outcome.left.mappings}}},
                 {"all_released", outcome.left.is_nothing()}};
  if (outcome.failure) {
    report["failure"] = {{"line", outcome.failure->line},
                         {"expected", outcome.failure->expected},
                         {"got", outcome.failure->got}};
  }
  return report.dump(2, ' ', false, json::error_handler_t::replace);
}

}  // namespace mvgpu::backend::scenario
