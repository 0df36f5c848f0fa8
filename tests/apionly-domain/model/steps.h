#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>

namespace mvgpu::domain::model {

// Builds with sanitizers take so much longer, and do so much less.
#if defined(__SANITIZE_THREAD__)
inline constexpr uint64_t kSlower = 25;
#elif defined(__SANITIZE_ADDRESS__)
inline constexpr uint64_t kSlower = 10;
#else
inline constexpr uint64_t kSlower = 1;
#endif

// How many steps a model check does.
inline uint64_t StepsFromEnvironment() {
  const char* wanted = std::getenv("MVGPU_MODEL_STEPS");
  const uint64_t steps = wanted != nullptr ? std::strtoull(wanted, nullptr, 10) : 40000;
  return std::max<uint64_t>(1000, steps / kSlower);
}

}  // namespace mvgpu::domain::model
