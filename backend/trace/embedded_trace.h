#pragma once

#include <cstddef>
#include <span>
#include <string_view>

namespace mvgpu::backend {

// The trace that mvgpu-replay runs when none is named: a Debian 12 guest whose modetest draws its
// pattern (tests/traces/README.md says how it was recorded).
inline constexpr std::string_view kEmbeddedTraceName = "(built-in) linux-6.12-modetest";
std::span<const std::byte> EmbeddedTrace();

}  // namespace mvgpu::backend
