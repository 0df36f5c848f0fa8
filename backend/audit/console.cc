#include "backend/audit/console.h"

#include <fmt/format.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>

namespace mvgpu::backend {

int Complain(AuditExit exit, std::string_view message) {
  fmt::print(stderr, "mvgpu-audit: {}\n", message);
  return exit;
}

int Print(std::string_view text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) == text.size() && std::fflush(stdout) == 0) {
    return kAuditOk;
  }
  return Complain(kAuditUnreadable,
                  fmt::format("cannot write to stdout: {}", std::strerror(errno)));
}

std::string SizeText(uint64_t bytes) {
  static constexpr std::array kUnits = {"bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  size_t unit = 0;
  while (bytes != 0 && bytes % 1024 == 0) {
    bytes /= 1024;
    ++unit;
  }
  return fmt::format("{} {}", bytes, kUnits[unit]);
}

}  // namespace mvgpu::backend
