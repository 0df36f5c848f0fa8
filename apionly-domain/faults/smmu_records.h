#pragma once

#include <array>
#include <cstdint>
#include <optional>

#include "apionly-domain/base/error.h"

namespace mvgpu::domain {

// What an SMMUv3 writes into its event queue about an access that found no translation (Arm IHI
// 0070, 7.3), 32 bytes.
struct SmmuEvent {
  using Words = std::array<uint64_t, 4>;
  enum class Type : uint8_t {
    kTranslation = 0x10,
    kAddressSize = 0x11,
    kAccess = 0x12,
    kPermission = 0x13,
  };

  Type type = Type::kTranslation;
  uint32_t stream = 0;
  std::optional<uint32_t> substream;  // 20 bits
  uint16_t tag = 0;                   // STAG
  bool is_stalled = false;            // it waits for CMD_RESUME with this tag
  bool is_read = false;
  bool is_instruction = false;
  bool is_privileged = false;
  bool is_stage2 = false;
  uint8_t input_class = 2;      // 0: fetching a context descriptor, 1: a table, 2: the input itself
  uint64_t address = 0;         // what the device used
  uint64_t stage2_address = 0;  // with is_stage2: whole pages
  bool operator==(const SmmuEvent&) const = default;

  Words encode() const;
  // Error: kInvalid, a record of another type.
  static Result<SmmuEvent> Decode(const Words& words);
};

// CMD_RESUME and CMD_STALL_TERM (4.6 there), the commands for stalled accesses.
struct SmmuResume {
  using Words = std::array<uint64_t, 2>;
  enum class Response : uint8_t { kTerminate = 0, kRetry = 1, kAbort = 2 };

  uint32_t stream = 0;
  std::optional<uint16_t> tag;  // none: all of the stream are terminated (CMD_STALL_TERM)
  Response response = Response::kTerminate;
  bool operator==(const SmmuResume&) const = default;

  Words encode() const;
  // Error: kInvalid (another command, the response that is reserved).
  static Result<SmmuResume> Decode(const Words& words);
};

}  // namespace mvgpu::domain
