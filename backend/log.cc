#include "backend/log.h"

#include <fmt/format.h>
#include <unistd.h>

#include <utility>

namespace mvgpu::backend {

void Log::info(std::string_view line) { print(line); }

void Log::warn(std::string_view line) {
  uint64_t dropped_before = 0;
  {
    MutexLock lock(mutex_);
    const auto now = std::chrono::steady_clock::now();
    if (now - second_ >= std::chrono::seconds(1)) {
      second_ = now;
      lines_in_second_ = 0;
      dropped_before = std::exchange(dropped_, 0);
    }
    if (++lines_in_second_ > kBurst) {
      ++dropped_;
      return;
    }
  }
  if (dropped_before > 0) print(fmt::format("{} more warnings were dropped", dropped_before));
  print(line);
}

void Log::print(std::string_view line) {
  // One write per line, so that lines of several processes on one terminal do not mix.
  const std::string text = fmt::format("{}: {}\n", program_, line);
  [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, text.data(), text.size());
}

}  // namespace mvgpu::backend
