#include "tests/backend/openmetrics_parser.h"

#include <fmt/format.h>

#include <cmath>
#include <cstdlib>
#include <optional>
#include <set>

namespace mvgpu::testing {

namespace {

bool IsName(std::string_view text, bool colon) {
  if (text.empty() || std::isdigit(static_cast<unsigned char>(text[0])) != 0) return false;
  for (const char c : text) {
    if (std::isalnum(static_cast<unsigned char>(c)) == 0 && c != '_' && !(colon && c == ':')) {
      return false;
    }
  }
  return true;
}

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Result<std::vector<OpenMetricsFamily>> Run() {
    if (!text_.ends_with("# EOF\n")) return Fail(ErrorCode::kInvalid, "does not end with # EOF");
    for (;;) {
      const size_t end = text_.find('\n');
      line_ = text_.substr(0, end);
      text_.remove_prefix(end + 1);
      if (line_ == "# EOF") break;
      const char* const problem = line_.starts_with("#") ? Descriptor() : Sample();
      if (problem != nullptr) {
        return Fail(ErrorCode::kInvalid, fmt::format("{}: '{}'", problem, line_));
      }
    }
    if (!text_.empty()) return Fail(ErrorCode::kInvalid, "text after # EOF");
    return std::move(families_);
  }

 private:
  // Up to the separator, which is taken too; the rest where there is none.
  static std::string_view Take(std::string_view& text, char separator) {
    const size_t end = text.find(separator);
    const std::string_view head = text.substr(0, end);
    text.remove_prefix(end == std::string_view::npos ? text.size() : end + 1);
    return head;
  }

  const char* Descriptor() {
    std::string_view rest = line_;
    if (Take(rest, ' ') != "#") return "no space after #";
    const std::string_view word = Take(rest, ' ');
    const std::string name(Take(rest, ' '));
    if (!IsName(name, true)) return "no metric name";
    if (families_.empty() || families_.back().name != name) {
      if (!names_.insert(name).second) return "the family was there before";
      families_.push_back({.name = name, .type = {}, .unit = {}, .help = {}, .samples = {}});
      seen_.clear();
    }
    OpenMetricsFamily& family = families_.back();
    if (!family.samples.empty()) return "metadata after samples";
    if (!described_.insert(fmt::format("{} {}", word, name)).second) return "said twice";
    if (word == "TYPE") {
      if (rest != "gauge" && rest != "counter") return "type is not known";
      family.type = rest;
    } else if (word == "UNIT") {
      if (!name.ends_with("_" + std::string(rest))) return "the name does not end with the unit";
      family.unit = rest;
    } else if (word == "HELP") {
      const auto help = Unescape(rest);
      if (!help) return "wrong escape";
      family.help = *help;
    } else {
      return "no TYPE, UNIT or HELP";
    }
    return nullptr;
  }

  const char* Sample() {
    if (families_.empty()) return "no family yet";
    OpenMetricsFamily& family = families_.back();
    OpenMetricsSample sample;
    const size_t name_end = line_.find_first_of("{ ");
    sample.name = line_.substr(0, name_end);
    if (sample.name != family.name + (family.type == "counter" ? "_total" : "")) {
      return "the sample is not of the family";
    }
    std::string_view rest = line_.substr(sample.name.size());
    if (rest.starts_with("{")) {
      if (const char* problem = Labels(rest, sample.labels)) return problem;
    }
    if (!seen_.insert(sample.labels).second) return "the same labels twice";
    if (!rest.starts_with(" ")) return "no space before the value";
    const std::string value(rest.substr(1));
    char* end = nullptr;
    sample.value = std::strtod(value.c_str(), &end);
    if (value.empty() || value[0] == ' ' || *end != '\0') return "no number";
    if (family.type == "counter" && !(sample.value >= 0)) return "negative counter";
    family.samples.push_back(std::move(sample));
    return nullptr;
  }

  // Takes {name="value",...} from the front.
  static const char* Labels(std::string_view& rest, std::map<std::string, std::string>& labels) {
    rest.remove_prefix(1);
    while (!rest.starts_with("}")) {
      const std::string name(Take(rest, '='));
      if (!IsName(name, false)) return "no label name";
      if (!rest.starts_with("\"")) return "no label value";
      size_t end = 1;
      while (end < rest.size() && rest[end] != '"') end += rest[end] == '\\' ? 2 : 1;
      if (end >= rest.size()) return "the label value does not end";
      const auto value = Unescape(rest.substr(1, end - 1));
      if (!value) return "wrong escape";
      if (!labels.emplace(name, *value).second) return "the same label twice";
      rest.remove_prefix(end + 1);
      if (rest.starts_with(",")) {
        rest.remove_prefix(1);
        if (rest.starts_with("}")) return "a comma at the end";
      } else if (!rest.starts_with("}")) {
        return "no comma between labels";
      }
    }
    rest.remove_prefix(1);
    return nullptr;
  }

  static std::optional<std::string> Unescape(std::string_view text) {
    std::string result;
    for (size_t i = 0; i < text.size(); ++i) {
      if (text[i] != '\\') {
        result += text[i];
        continue;
      }
      if (++i == text.size()) return std::nullopt;
      if (text[i] != 'n' && text[i] != '\\' && text[i] != '"') return std::nullopt;
      result += text[i] == 'n' ? '\n' : text[i];
    }
    return result;
  }

  std::string_view text_;
  std::string_view line_;
  std::vector<OpenMetricsFamily> families_;
  std::set<std::string> names_;
  std::set<std::string> described_;                    // "TYPE name"
  std::set<std::map<std::string, std::string>> seen_;  // labels of the family's samples
};

}  // namespace

Result<std::vector<OpenMetricsFamily>> ParseOpenMetrics(std::string_view text) {
  return Parser(text).Run();
}

}  // namespace mvgpu::testing
