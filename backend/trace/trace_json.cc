#include "backend/trace/trace_json.h"

namespace mvgpu::backend {

std::optional<nlohmann::json> ParseTraceJson(std::string_view text) {
  using nlohmann::json;
  using Event = json::parse_event_t;
  bool is_nested = false;
  const auto look = [&is_nested](int depth, Event event, json&) {
    if (depth > 0 && (event == Event::object_start || event == Event::array_start)) {
      is_nested = true;
    }
    return !is_nested;
  };
  json object = json::parse(text, look, /*allow_exceptions=*/false);
  if (is_nested || !object.is_object()) return std::nullopt;
  return object;
}

}  // namespace mvgpu::backend
