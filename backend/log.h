#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>

#include "apionly-domain/base/mutex.h"

namespace mvgpu::backend {

// One line per event on standard error, "mvgpu-backend: ...". What a guest or a VMM can cause goes
// through warn(), which lets at most kBurst lines through per second and says how many it dropped.
// Thread-safe.
class Log {
 public:
  static constexpr uint64_t kBurst = 20;

  explicit Log(std::string_view program) : program_(program) {}
  // Lines of the program itself: start, end of a VM, results. Never dropped.
  void info(std::string_view line);
  void warn(std::string_view line);

 private:
  void print(std::string_view line);

  const std::string program_;
  Mutex mutex_;
  std::chrono::steady_clock::time_point second_ ABSL_GUARDED_BY(mutex_);
  uint64_t lines_in_second_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t dropped_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace mvgpu::backend
