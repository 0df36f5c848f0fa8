#pragma once

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <map>
#include <string>

namespace mvgpu::backend {

// Adds an option whose value is one of a few names. A wrong one is answered with all of them.
// `target` is the default and outlives the parsing.
template <typename T>
CLI::Option* AddChoice(CLI::App& app, const std::string& option, T& target,
                       const std::map<std::string, T>& choices, const std::string& description) {
  return app
      .add_option_function<std::string>(
          option, [&target, choices](const std::string& name) { target = choices.at(name); },
          description)
      ->check([choices](const std::string& name) {
        if (choices.contains(name)) return std::string();
        std::string known;
        for (const auto& [choice, value] : choices) known += (known.empty() ? "" : ", ") + choice;
        return fmt::format("'{}' is not known, choose one of: {}", name, known);
      })
      ->option_text("NAME");
}

}  // namespace mvgpu::backend
