#pragma once

#include <optional>
#include <string_view>

#include <nlohmann/json.hpp>

namespace mvgpu::backend {

// The JSON object of a kSession or kSummary record; nullopt for anything else. Its values are
// numbers, texts and truth values: an object or array inside is refused, since printing it would
// use as much stack as the file likes.
std::optional<nlohmann::json> ParseTraceJson(std::string_view text);

}  // namespace mvgpu::backend
