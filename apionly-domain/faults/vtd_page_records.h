#pragma once

#include <array>
#include <cstdint>
#include <optional>

#include "apionly-domain/base/error.h"
#include "apionly-domain/faults/page_request.h"

namespace mvgpu::domain {

// An entry of VT-d's page request queue (VT-d specification, 7.4.1: page request descriptor), 32
// bytes.
struct VtdPageRequest {
  static constexpr uint64_t kBytes = 32;
  using Words = std::array<uint64_t, 4>;

  uint16_t requester = 0;         // bus, device and function
  std::optional<uint32_t> pasid;  // 20 bits
  uint16_t group = 0;             // page request group index, 9 bits
  bool reads = false;
  bool writes = false;
  bool executes = false;
  bool is_privileged = false;
  bool is_last = false;  // of its group
  uint64_t address = 0;  // whole pages
  bool operator==(const VtdPageRequest&) const = default;

  // A device that stops says so with a last request for nothing; there is no answer to it.
  bool is_stop_marker() const { return is_last && !reads && !writes; }
  Words encode() const;
  // Error: kInvalid, the type is another one.
  static Result<VtdPageRequest> Decode(const Words& words);
};

// The page group response descriptor of VT-d's invalidation queue (6.5.2.10); the lower two of four
// words, the others are 0.
struct VtdGroupResponse {
  using Words = std::array<uint64_t, 2>;

  uint16_t requester = 0;
  std::optional<uint32_t> pasid;
  uint16_t group = 0;
  bool is_last = true;
  FaultAnswer answer = FaultAnswer::kSuccess;
  bool operator==(const VtdGroupResponse&) const = default;

  Words encode() const;
  // Error: kInvalid (another type, reserved bits, an unknown code).
  static Result<VtdGroupResponse> Decode(const Words& words);
};

}  // namespace mvgpu::domain
