#pragma once

// Scenarios: what a guest, a device and a VMM do one after the other, as text that people write.
//
//   mvgpu scenario 1
//   # one command a line, from '#' on a comment
//   memory 1M
//   expect pinned = 0
//
// Words are apart by blanks. The file is taken apart here, with bounds on everything; what its
// words mean is the business of command.h.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "apionly-domain/base/error.h"

namespace mvgpu::backend::scenario {

inline constexpr std::string_view kFirstLine = "mvgpu scenario 1";
inline constexpr uint64_t kMostBytes = 1 << 20;  // of a file
inline constexpr size_t kMostLineBytes = 500;
inline constexpr size_t kMostWords = 64;     // of a line
inline constexpr size_t kMostLines = 10000;  // with words

struct Line {
  uint32_t number = 0;  // from 1
  std::vector<std::string> words;
};

// Whether the file begins like a scenario, of any version. False for whatever cannot be read.
bool IsScenario(const std::string& path);

// Errors: kSystem, kInvalid (no regular file, too large).
Result<std::string> ReadScenario(const std::string& path);

// The lines with words, without the first one. Errors: kInvalid, as "NAME:LINE: what, remedy".
Result<std::vector<Line>> SplitScenario(std::string_view name, std::string_view text);

// The same words with one blank between them.
std::string JoinWords(const std::vector<std::string>& words);

}  // namespace mvgpu::backend::scenario
