#pragma once

// Options that more than one of the programs have.

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <charconv>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>

#include "backend/vgpu_config.h"

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

// Adds an option whose value is a number of bytes, with a unit or without (K, M, G, ..., of 1024).
template <typename T>
CLI::Option* AddSize(CLI::App& app, const std::string& option, T& target,
                     const std::string& description) {
  // CLI11 reads "-1" as 2^64 - 1, and so what is larger than that. Transforms run in the reverse
  // order of their definition.
  return app.add_option(option, target, description)
      ->transform(CLI::AsSizeValue(/*kb_is_1000=*/false).description(""))
      ->transform([](const std::string& text) {
        uint64_t number = 0;
        const auto read = std::from_chars(text.data(), text.data() + text.size(), number);
        if (text.find('-') != std::string::npos || read.ec == std::errc::result_out_of_range) {
          throw CLI::ValidationError(fmt::format("'{}' is no size, give for example 8G", text));
        }
        return text;
      })
      ->type_name("SIZE");
}

// --dma, --iommu-group, --vfio-device and --vulkan-device; `config` is the default and outlives the
// parsing.
void AddDmaOptions(CLI::App& app, VgpuConfig& config);

// --dma-idle; `bytes` stays nullopt without it, which is what `without` is about, and outlives the
// parsing.
void AddIdleOption(CLI::App& app, std::optional<uint64_t>& bytes, std::string_view without);

}  // namespace mvgpu::backend
