#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "apionly-domain/base/error.h"
#include "backend/scenario/command.h"
#include "backend/scenario/world.h"
#include "backend/vgpu_config.h"

namespace mvgpu::backend::scenario {

// What came of a scenario.
struct Outcome {
  struct Done {
    uint32_t line = 0;
    std::string text;
    std::string answer;
    bool is_expectation = false;
    bool is_good = true;
  };
  // The first step that did not go as it should. It is the last of `steps`.
  struct Failure {
    uint32_t line = 0;
    std::string expected;
    std::string got;
  };
  std::vector<Done> steps;
  uint64_t expectations = 0;
  std::optional<Failure> failure;
  World::Left left;  // when everything was taken down

  bool is_good() const { return !failure && left.is_nothing(); }
};

// Runs the steps one after the other, up to the first that fails, in a world of their own, which is
// taken down at the end.
Outcome RunSteps(const std::vector<Step>& steps, PinMode pin);

// For people, and for programs: one JSON object.
void PrintOutcome(const std::string& name, const Outcome& outcome);
std::string OutcomeAsJson(const std::string& name, const Outcome& outcome);

}  // namespace mvgpu::backend::scenario
