#include "apionly-domain/faults/smmu_records.h"

#include <fmt/format.h>

#include "apionly-domain/base/address.h"

namespace mvgpu::domain {

namespace {

constexpr uint64_t kResumeCommand = 0x44;
constexpr uint64_t kTerminateCommand = 0x45;
constexpr uint64_t kSubstreamMask = 0xfffff;
constexpr uint64_t kStage2AddressMask = 0x000f'ffff'ffff'f000;

constexpr uint64_t Bit(bool value, unsigned at) { return uint64_t{value} << at; }
constexpr bool IsSet(uint64_t word, unsigned at) { return (word >> at & 1) != 0; }

}  // namespace

SmmuEvent::Words SmmuEvent::encode() const {
  return {static_cast<uint64_t>(type) | Bit(substream.has_value(), 11) |
              (uint64_t{substream.value_or(0)} & kSubstreamMask) << 12 | uint64_t{stream} << 32,
          uint64_t{tag} | Bit(is_stalled, 31) | Bit(is_privileged, 33) | Bit(is_instruction, 34) |
              Bit(is_read, 35) | Bit(is_stage2, 39) | (uint64_t{input_class} & 3) << 40,
          address, is_stage2 ? stage2_address & kStage2AddressMask : 0};
}

Result<SmmuEvent> SmmuEvent::Decode(const Words& words) {
  const uint64_t type = words[0] & 0xff;
  if (type < static_cast<uint64_t>(Type::kTranslation) ||
      type > static_cast<uint64_t>(Type::kPermission)) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("event {:#x} of an smmu is not about a translation", type));
  }
  SmmuEvent event;
  event.type = static_cast<Type>(type);
  event.stream = static_cast<uint32_t>(words[0] >> 32);
  if (IsSet(words[0], 11)) event.substream = static_cast<uint32_t>(words[0] >> 12 & kSubstreamMask);
  event.tag = static_cast<uint16_t>(words[1]);
  event.is_stalled = IsSet(words[1], 31);
  event.is_privileged = IsSet(words[1], 33);
  event.is_instruction = IsSet(words[1], 34);
  event.is_read = IsSet(words[1], 35);
  event.is_stage2 = IsSet(words[1], 39);
  event.input_class = static_cast<uint8_t>(words[1] >> 40 & 3);
  event.address = words[2];
  if (event.is_stage2) event.stage2_address = words[3] & kStage2AddressMask;
  return event;
}

SmmuResume::Words SmmuResume::encode() const {
  if (!tag) return {kTerminateCommand | uint64_t{stream} << 32, 0};
  return {kResumeCommand | static_cast<uint64_t>(response) << 12 | uint64_t{stream} << 32, *tag};
}

Result<SmmuResume> SmmuResume::Decode(const Words& words) {
  const uint64_t command = words[0] & 0xff;
  const uint64_t response = words[0] >> 12 & 3;
  if (command != kResumeCommand && command != kTerminateCommand) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("command {:#x} of an smmu is not about stalled accesses", command));
  }
  SmmuResume resume;
  resume.stream = static_cast<uint32_t>(words[0] >> 32);
  if (command == kTerminateCommand) return resume;
  if (response > static_cast<uint64_t>(Response::kAbort)) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("response {} of CMD_RESUME is reserved", response));
  }
  resume.tag = static_cast<uint16_t>(words[1]);
  resume.response = static_cast<Response>(response);
  return resume;
}

}  // namespace mvgpu::domain
