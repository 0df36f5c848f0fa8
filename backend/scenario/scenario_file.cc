#include "backend/scenario/scenario_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <optional>

#include "apionly-domain/base/unique_fd.h"

namespace mvgpu::backend::scenario {

namespace {

constexpr std::string_view kMagic = "mvgpu scenario ";

// O_NONBLOCK: a FIFO is refused, not waited for.
UniqueFd OpenFile(const std::string& path, struct stat* status) {
  UniqueFd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (fd.is_valid() && fstat(fd.get(), status) != 0) fd.reset();
  return fd;
}

tl::unexpected<Error> Bad(std::string_view name, size_t line, std::string_view what) {
  return Fail(ErrorCode::kInvalid, fmt::format("{}:{}: {}", name, line, what));
}

// The part before a comment.
std::string_view WithoutComment(std::string_view line) { return line.substr(0, line.find('#')); }

// What is wrong with the characters of a line; nullopt if nothing is.
std::optional<std::string> ProblemOf(std::string_view line) {
  if (line.size() > kMostLineBytes) {
    return fmt::format("a line of {} bytes, at most {} are allowed: cut it", line.size(),
                       kMostLineBytes);
  }
  const std::string_view command = WithoutComment(line);
  for (size_t i = 0; i < line.size(); ++i) {
    const auto byte = static_cast<unsigned char>(line[i]);
    if (byte == '\t') continue;
    if (byte < 0x20 || byte == 0x7f) {
      return fmt::format("byte {:#04x} at column {}: scenarios are text with plain line ends", byte,
                         i + 1);
    }
    if (byte >= 0x80 && i < command.size()) {
      return fmt::format("byte {:#04x} at column {}: only comments may have other than ASCII", byte,
                         i + 1);
    }
  }
  return std::nullopt;
}

std::vector<std::string> WordsOf(std::string_view line) {
  std::vector<std::string> words;
  line = WithoutComment(line);
  for (size_t at = 0; (at = line.find_first_not_of(" \t", at)) != std::string_view::npos;) {
    const size_t end = std::min(line.find_first_of(" \t", at), line.size());
    words.emplace_back(line.substr(at, end - at));
    at = end;
  }
  return words;
}

}  // namespace

bool IsScenario(const std::string& path) {
  struct stat status = {};
  const UniqueFd fd = OpenFile(path, &status);
  if (!fd.is_valid() || !S_ISREG(status.st_mode)) return false;
  std::array<char, kMagic.size()> head{};
  const ssize_t got = pread(fd.get(), head.data(), head.size(), 0);
  return got == static_cast<ssize_t>(head.size()) &&
         std::string_view(head.data(), head.size()) == kMagic;
}

Result<std::string> ReadScenario(const std::string& path) {
  struct stat status = {};
  const UniqueFd fd = OpenFile(path, &status);
  if (!fd.is_valid()) return FailSystem(errno, fmt::format("cannot read the scenario {}", path));
  if (!S_ISREG(status.st_mode)) {
    return Fail(ErrorCode::kInvalid, fmt::format("{} is not a file; name a scenario", path));
  }
  // One byte more than allowed, whatever the size was when it was opened.
  std::string text(kMostBytes + 1, '\0');
  size_t have = 0;
  while (have < text.size()) {
    const ssize_t got =
        pread(fd.get(), text.data() + have, text.size() - have, static_cast<off_t>(have));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return FailSystem(errno, fmt::format("cannot read the scenario {}", path));
    if (got == 0) break;
    have += static_cast<size_t>(got);
  }
  if (have > kMostBytes) {
    return Fail(
        ErrorCode::kInvalid,
        fmt::format("{} has more than {} bytes: cut it into several scenarios", path, kMostBytes));
  }
  text.resize(have);
  return text;
}

Result<std::vector<Line>> SplitScenario(std::string_view name, std::string_view text) {
  std::vector<Line> lines;
  uint32_t number = 0;
  while (!text.empty()) {
    const size_t end = std::min(text.find('\n'), text.size());
    const std::string_view line = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    ++number;
    if (const auto problem = ProblemOf(line)) return Bad(name, number, *problem);
    if (number == 1) {
      if (line == kFirstLine) continue;
      return Bad(name, 1,
                 fmt::format("'{}' is not '{}', which is all that this program knows",
                             line.substr(0, 40), kFirstLine));
    }
    std::vector<std::string> words = WordsOf(line);
    if (words.empty()) continue;
    if (words.size() > kMostWords) {
      return Bad(name, number,
                 fmt::format("{} words, at most {} are allowed: make it two lines", words.size(),
                             kMostWords));
    }
    if (lines.size() == kMostLines) {
      return Bad(name, number,
                 fmt::format("more than {} commands: make it two scenarios", kMostLines));
    }
    lines.push_back({number, std::move(words)});
  }
  if (number == 0) return Bad(name, 1, fmt::format("nothing is there, not even '{}'", kFirstLine));
  return lines;
}

std::string JoinWords(const std::vector<std::string>& words) {
  return fmt::format("{}", fmt::join(words, " "));
}

}  // namespace mvgpu::backend::scenario
