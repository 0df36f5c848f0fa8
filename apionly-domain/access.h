#pragma once

#include <cstdint>
#include <string_view>

namespace mvgpu::domain {

// What the device may do with a mapping; also what an access wants to do.
enum class Access : uint8_t { kRead = 1, kWrite = 2, kReadWrite = 3 };

constexpr bool Allows(Access granted, Access wanted) {
  return (static_cast<uint8_t>(wanted) & ~static_cast<uint8_t>(granted)) == 0;
}

constexpr std::string_view AccessName(Access access) {
  switch (access) {
    case Access::kRead:
      return "read";
    case Access::kWrite:
      return "write";
    case Access::kReadWrite:
      return "read-write";
  }
  return "no";
}

}  // namespace mvgpu::domain
