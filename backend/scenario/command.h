#pragma once

// What the words of a scenario mean. Each command is one line of a table: how it is written, and
// what runs it. The way it is written is the grammar too:
//
//   map IOVA SIZE at OFFSET r|w|rw
//
//   at, r|w|rw    these very words; of several, one
//   NAME          a name: letters, digits and '-', 32 at most
//   TEXT          any word
//   IOVA, SIZE    any other upper-case word is a number: decimal or 0x..., K, M or G behind it
//   FRAME...      one number or more, to the end of the line
//
// A step is a command, or `expect COMMAND = ANSWER`: the same command, run in the same way, and
// what it has to answer. So whatever can be done can be expected, a refusal too ("error limit").

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "apionly-domain/base/error.h"

namespace mvgpu::backend::scenario {

class World;

// In the order of the usage, each kind for itself; words only where there is a choice.
struct Arguments {
  std::vector<uint64_t> numbers;
  std::vector<std::string> words;
};

struct Command {
  std::string_view usage;
  // What happened, in few words without a host address or a time: the same in every run.
  Result<std::string> (*run)(World& world, const Arguments& arguments);
};

struct Step {
  uint32_t line = 0;
  std::string text;  // as it was written, with single blanks
  const Command* command = nullptr;
  Arguments arguments;
  std::optional<std::vector<std::string>> expected;  // words
};

// All of them, by system. The spans are of constants.
std::vector<std::span<const Command>> AllCommands();

// A number as scenarios write it; nullopt when it is none, or beyond 64 bits.
std::optional<uint64_t> ParseNumber(std::string_view word);

// The whole scenario, before any of it runs. Errors: kInvalid, as "NAME:LINE: what, remedy".
Result<std::vector<Step>> ParseScenario(std::string_view name, std::string_view text);

// Whether an answer is what was expected: word by word, numbers by their value.
bool IsExpected(const std::vector<std::string>& expected, std::string_view answer);

}  // namespace mvgpu::backend::scenario
