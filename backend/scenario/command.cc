#include "backend/scenario/command.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <iterator>

#include "backend/scenario/commands.h"
#include "backend/scenario/scenario_file.h"

namespace mvgpu::backend::scenario {

namespace {

constexpr size_t kMostNameBytes = 32;

std::vector<std::string_view> Split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  while (true) {
    const size_t end = text.find(separator);
    parts.push_back(text.substr(0, end));
    if (end == std::string_view::npos) return parts;
    text.remove_prefix(end + 1);
  }
}

bool IsName(std::string_view word) {
  return word.size() <= kMostNameBytes && std::all_of(word.begin(), word.end(), [](char c) {
           return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '-';
         });
}

bool IsPlaceholder(std::string_view pattern) {
  return std::isupper(static_cast<unsigned char>(pattern.front())) != 0;
}

// How far words fit a usage, and what is wrong with the next one.
struct Fit {
  size_t words = 0;
  std::string problem;  // empty: all of them fit
  Arguments arguments;
};

// Empty when the word fits; then what it says is added to *arguments.
std::string FitWord(std::string_view pattern, const std::string& word, Arguments* arguments) {
  if (!IsPlaceholder(pattern)) {
    const auto choices = Split(pattern, '|');
    if (std::find(choices.begin(), choices.end(), word) == choices.end()) {
      return fmt::format("'{}' instead of {}", word, pattern);
    }
    if (choices.size() > 1) arguments->words.push_back(word);
    return {};
  }
  if (pattern == "TEXT" || (pattern == "NAME" && IsName(word))) {
    arguments->words.push_back(word);
    return {};
  }
  if (pattern == "NAME") {
    return fmt::format("'{}' is no name: take letters, digits and '-', {} at most", word,
                       kMostNameBytes);
  }
  const auto number = ParseNumber(word);
  if (!number) {
    return fmt::format("'{}' is no number for {}: write 4096, 0x1000, 4K", word, pattern);
  }
  arguments->numbers.push_back(*number);
  return {};
}

Fit FitUsage(std::string_view usage, std::span<const std::string> words) {
  Fit fit;
  for (std::string_view pattern : Split(usage, ' ')) {
    const bool repeats = pattern.ends_with("...");
    if (repeats) pattern.remove_suffix(3);
    do {
      if (fit.words == words.size()) {
        fit.problem = fmt::format("{} is missing", pattern);
        return fit;
      }
      fit.problem = FitWord(pattern, words[fit.words], &fit.arguments);
      if (!fit.problem.empty()) return fit;
      ++fit.words;
    } while (repeats && fit.words < words.size());
  }
  if (fit.words < words.size()) fit.problem = fmt::format("'{}' is too much", words[fit.words]);
  return fit;
}

std::string_view FirstWord(std::string_view usage) { return usage.substr(0, usage.find(' ')); }

std::string KnownCommands() {
  std::vector<std::string_view> names;
  for (const auto commands : AllCommands()) {
    for (const Command& command : commands) names.push_back(FirstWord(command.usage));
  }
  std::sort(names.begin(), names.end());
  names.erase(std::unique(names.begin(), names.end()), names.end());
  return fmt::format("expect, {}", fmt::join(names, ", "));
}

// Finds the command; fills in the step. Otherwise what is wrong, with a remedy.
std::string FindCommand(std::span<const std::string> words, Step* step) {
  if (words.empty()) return "a command is missing";
  std::optional<Fit> best;
  std::vector<std::string_view> usages;
  for (const auto commands : AllCommands()) {
    for (const Command& command : commands) {
      if (FirstWord(command.usage) != words[0]) continue;
      Fit fit = FitUsage(command.usage, words);
      if (fit.problem.empty()) {
        step->command = &command;
        step->arguments = std::move(fit.arguments);
        return {};
      }
      usages.push_back(command.usage);
      if (!best || fit.words > best->words) best = std::move(fit);
    }
  }
  if (!best) return fmt::format("unknown command '{}'; there are: {}", words[0], KnownCommands());
  return fmt::format("{}; write: {}", best->problem, fmt::join(usages, ", or: "));
}

// Likewise.
std::string ParseLine(const Line& line, Step* step) {
  step->line = line.number;
  step->text = JoinWords(line.words);
  std::span<const std::string> words(line.words);
  if (words[0] == "expect") {
    const auto equals = std::find(words.begin(), words.end(), "=");
    if (equals == words.end() || std::next(equals) == words.end()) {
      return "no answer is expected; write: expect COMMAND = ANSWER";
    }
    step->expected.emplace(std::next(equals), words.end());
    words = words.subspan(1, static_cast<size_t>(equals - words.begin()) - 1);
  }
  return FindCommand(words, step);
}

bool IsSameWord(std::string_view expected, std::string_view got) {
  if (expected == got) return true;
  const auto wanted = ParseNumber(expected);
  return wanted && wanted == ParseNumber(got);
}

}  // namespace

std::vector<std::span<const Command>> AllCommands() {
  return {MemoryCommands(), DmaCommands(),   ZpciCommands(),   ViommuCommands(),
          VgpuCommands(),   FaultCommands(), CoiommuCommands()};
}

std::optional<uint64_t> ParseNumber(std::string_view word) {
  const bool is_hex = word.starts_with("0x");
  if (is_hex) word.remove_prefix(2);
  unsigned shift = 0;
  if (!is_hex && !word.empty()) {
    constexpr std::string_view kUnits = "KMG";
    const size_t unit = kUnits.find(word.back());
    if (unit != std::string_view::npos) {
      shift = 10 * static_cast<unsigned>(unit + 1);
      word.remove_suffix(1);
    }
  }
  uint64_t value = 0;
  const auto [end, problem] =
      std::from_chars(word.data(), word.data() + word.size(), value, is_hex ? 16 : 10);
  if (problem != std::errc() || end != word.data() + word.size()) return std::nullopt;
  if (value > UINT64_MAX >> shift) return std::nullopt;
  return value << shift;
}

Result<std::vector<Step>> ParseScenario(std::string_view name, std::string_view text) {
  MVGPU_ASSIGN_OR_RETURN(const std::vector<Line> lines, SplitScenario(name, text));
  std::vector<Step> steps;
  steps.reserve(lines.size());
  for (const Line& line : lines) {
    Step step;
    if (const std::string problem = ParseLine(line, &step); !problem.empty()) {
      return Fail(ErrorCode::kInvalid, fmt::format("{}:{}: {}", name, line.number, problem));
    }
    steps.push_back(std::move(step));
  }
  return steps;
}

bool IsExpected(const std::vector<std::string>& expected, std::string_view answer) {
  const auto words = Split(answer, ' ');
  return std::equal(expected.begin(), expected.end(), words.begin(), words.end(), IsSameWord);
}

}  // namespace mvgpu::backend::scenario
