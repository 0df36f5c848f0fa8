#pragma once

#include <string>
#include <string_view>

#include "tests/bench/harness.h"

namespace mvgpu::bench {

// The machine that the figures are from.
struct Machine {
  std::string cpu_model;
  std::string kernel;
  unsigned cores = 0;

  static Machine Here();
};

// For people: a heading, then one line for each row.
std::string Heading(const Settings& settings, const Machine& machine);
std::string LineOf(const Row& row);
// For programs: one JSON object.
std::string JsonOf(std::string_view table, const Settings& settings, const Machine& machine,
                   const std::vector<Row>& rows);

}  // namespace mvgpu::bench
