#include "backend/policies/kernel_text.h"

#include <fmt/format.h>

#include <charconv>

#include "apionly-domain/base/address.h"

namespace mvgpu::backend {

namespace {

constexpr size_t kMostQuoted = 40;

// `seconds.micros` or `seconds.nanos`, in ns.
std::optional<uint64_t> ParseSeconds(std::string_view text) {
  const size_t dot = text.find('.');
  if (dot == std::string_view::npos) return std::nullopt;
  const std::string_view digits = text.substr(dot + 1);
  const auto seconds = ParseNumber(text.substr(0, dot), 10);
  auto fraction = ParseNumber(digits, 10);
  if (!seconds || !fraction || digits.size() > 9) return std::nullopt;
  for (size_t i = digits.size(); i < 9; ++i) *fraction *= 10;
  const auto ns = CheckedMul(*seconds, 1'000'000'000);
  return ns ? CheckedAdd(*ns, *fraction) : std::nullopt;
}

std::string_view WithoutBlanks(std::string_view text) {
  while (text.starts_with(' ')) text.remove_prefix(1);
  return text;
}

// `[system:]event: fields`.
std::optional<KernelEvent> ParseEvent(std::string_view text, uint64_t time_ns) {
  text = WithoutBlanks(text);
  const size_t end = text.find(": ");
  if (end == std::string_view::npos) return std::nullopt;
  const std::string_view name = text.substr(0, end);
  if (name.empty() || name.find(' ') != std::string_view::npos) return std::nullopt;
  const std::string_view fields = WithoutBlanks(text.substr(end + 2));
  const size_t colon = name.rfind(':');
  if (colon == std::string_view::npos) return KernelEvent{{}, name, fields, time_ns};
  return KernelEvent{name.substr(0, colon), name.substr(colon + 1), fields, time_ns};
}

}  // namespace

std::optional<uint64_t> ParseNumber(std::string_view text, int base) {
  if (text.starts_with("0x")) {
    text.remove_prefix(2);
    base = 16;
  }
  uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, base);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

// Names of tasks may hold anything, so the first time that an event follows is the time.
std::optional<KernelEvent> FindKernelEvent(std::string_view line) {
  for (size_t colon = line.find(": "); colon != std::string_view::npos;
       colon = line.find(": ", colon + 1)) {
    const std::string_view before = line.substr(0, colon);
    const size_t space = before.find_last_of(' ');
    const auto time = ParseSeconds(before.substr(space == std::string_view::npos ? 0 : space + 1));
    if (!time) continue;
    if (const auto event = ParseEvent(line.substr(colon + 2), *time)) return event;
  }
  return std::nullopt;
}

std::optional<std::string_view> FieldOf(std::string_view fields, std::string_view key) {
  const std::string wanted = fmt::format("{}=", key);
  for (size_t at = fields.find(wanted); at != std::string_view::npos;
       at = fields.find(wanted, at + 1)) {
    if (at != 0 && fields[at - 1] != ' ') continue;
    const std::string_view value = fields.substr(at + wanted.size());
    return value.substr(0, value.find(' '));
  }
  return std::nullopt;
}

Result<uint64_t> NumberOf(const KernelEvent& event, std::string_view key, int base) {
  const auto text = FieldOf(event.fields, key);
  if (!text) {
    return Fail(ErrorCode::kCorrupt, fmt::format("a {} event without {}", event.name, key));
  }
  const auto number = ParseNumber(*text, base);
  if (number) return *number;
  return Fail(ErrorCode::kCorrupt, fmt::format("a {} event with {}={}, which is no number",
                                               event.name, key, Quoted(*text)));
}

Result<std::vector<uint64_t>> ListOf(const KernelEvent& event, std::string_view key) {
  auto text = FieldOf(event.fields, key);
  if (!text || !text->starts_with('{') || !text->ends_with('}')) {
    return Fail(ErrorCode::kCorrupt, fmt::format("a {} event without {} in {{}}", event.name, key));
  }
  std::string_view rest = text->substr(1, text->size() - 2);
  std::vector<uint64_t> numbers;
  while (!rest.empty()) {
    const size_t comma = rest.find(',');
    const std::string_view word = rest.substr(0, comma);
    const auto number = ParseNumber(word, 10);
    if (!number) {
      return Fail(ErrorCode::kCorrupt, fmt::format("a {} event with {} in {}, which is no number",
                                                   event.name, Quoted(word), key));
    }
    numbers.push_back(*number);
    rest = comma == std::string_view::npos ? std::string_view() : rest.substr(comma + 1);
  }
  return numbers;
}

std::string Quoted(std::string_view text) {
  std::string quoted = "'";
  for (const char letter : text.substr(0, kMostQuoted)) {
    quoted += letter >= ' ' && letter <= '~' ? letter : '?';
  }
  return quoted + (text.size() > kMostQuoted ? "...'" : "'");
}

}  // namespace mvgpu::backend
