#include "apionly-domain/faults/smmu_entries.h"

#include <fmt/format.h>

#include "apionly-domain/base/address.h"

namespace mvgpu::domain {

namespace {

constexpr uint64_t Field(uint64_t word, unsigned first, unsigned bits) {
  return word >> first & ((uint64_t{1} << bits) - 1);
}
constexpr bool Bit(uint64_t word, unsigned at) { return Field(word, at, 1) != 0; }

constexpr unsigned kLinear = 0;  // S1Fmt
constexpr uint64_t kContextPointer = 0x000f'ffff'ffff'ffc0;

bool HasAddress(SmmuInvalidation::Kind kind) {
  return kind == SmmuInvalidation::Kind::kAddress || kind == SmmuInvalidation::Kind::kStage2;
}
bool HasAsid(SmmuInvalidation::Kind kind) {
  return kind == SmmuInvalidation::Kind::kAddress || kind == SmmuInvalidation::Kind::kAsid;
}

}  // namespace

std::optional<SmmuStreamEntry::Config> SmmuStreamEntry::config() const {
  const uint64_t config = Field(words[0], 1, 3);
  if (config >= 1 && config <= 3) return std::nullopt;
  return static_cast<Config>(config);
}

std::optional<SmmuStreamEntry::WithoutSubstream> SmmuStreamEntry::without_substream() const {
  const uint64_t value = Field(words[1], 0, 2);
  if (value > static_cast<uint64_t>(WithoutSubstream::kFirstDescriptor)) return std::nullopt;
  return static_cast<WithoutSubstream>(value);
}

std::optional<uint64_t> SmmuStreamEntry::descriptor_of(uint32_t substream) const {
  const bool is_linear = Field(words[0], 4, 2) == kLinear || descriptors() == 1;
  if (!has_stage1() || !is_linear || substream >= descriptors()) return std::nullopt;
  return (words[0] & kContextPointer) + uint64_t{substream} * SmmuContextDescriptor::kBytes;
}

std::optional<VmsaStage2Format::Options> SmmuStreamEntry::stage2() const {
  const auto bits = vmsa::SizeBits(static_cast<unsigned>(Field(words[2], 48, 3)));
  const bool is_4k = Field(words[2], 46, 2) == 0;
  if (!has_stage2() || !is_4k || !Bit(words[2], 51) || !bits) return std::nullopt;
  VmsaStage2Format::Options options;
  options.t0sz = static_cast<uint8_t>(Field(words[2], 32, 6));
  options.sl0 = static_cast<uint8_t>(Field(words[2], 38, 2));
  options.output_bits = static_cast<uint8_t>(*bits);
  options.flags.ignores_access_flag = Bit(words[2], 53);
  return options;
}

std::optional<VmsaStage1Format::Options> SmmuContextDescriptor::stage1() const {
  const auto bits = vmsa::SizeBits(static_cast<unsigned>(Field(words[0], 32, 3)));
  const bool is_4k = Field(words[0], 6, 2) == 0;
  const bool walks = !Bit(words[0], 14);  // EPD0
  if (!is_valid() || !is_4k || !walks || !Bit(words[0], 41) || !bits) return std::nullopt;
  VmsaStage1Format::Options options;
  options.t0sz = static_cast<uint8_t>(Field(words[0], 0, 6));
  options.output_bits = static_cast<uint8_t>(*bits);
  options.flags.ignores_access_flag = Bit(words[0], 35);
  options.flags.sets_dirty = Bit(words[0], 42);
  options.flags.sets_access_flag = Bit(words[0], 43);
  return options;
}

SmmuInvalidation::Words SmmuInvalidation::encode() const {
  Words command{static_cast<uint64_t>(kind) | uint64_t{vmid} << 32, 0};
  if (HasAsid(kind)) command[0] |= uint64_t{asid} << 48;
  if (HasAddress(kind)) command[1] = (page & ~kPageMask) | uint64_t{leaf_only};
  return command;
}

Result<SmmuInvalidation> SmmuInvalidation::Decode(const Words& words) {
  const auto kind = static_cast<Kind>(words[0] & 0xff);
  if (!HasAddress(kind) && !HasAsid(kind) && kind != Kind::kVmAll) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("command {:#x} of an smmu is none of the invalidations 0x11, 0x12, "
                            "0x28, 0x2a",
                            words[0] & 0xff));
  }
  SmmuInvalidation invalidation;
  invalidation.kind = kind;
  invalidation.vmid = static_cast<uint16_t>(words[0] >> 32);
  if (HasAsid(kind)) invalidation.asid = static_cast<uint16_t>(words[0] >> 48);
  if (HasAddress(kind)) {
    invalidation.leaf_only = (words[1] & 1) != 0;
    invalidation.page = words[1] & ~kPageMask;
  }
  return invalidation;
}

}  // namespace mvgpu::domain
