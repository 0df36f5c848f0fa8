#include "apionly-domain/nested/vmsa_stage2.h"

namespace mvgpu::domain {

tl::expected<WalkStart<VmsaStage2Format::Path>, NoStart> VmsaStage2Format::begin(
    uint64_t root, uint64_t address) const {
  constexpr unsigned kMostSl0 = 2;
  constexpr unsigned kMostConcatenatedBits = 4;
  const unsigned bits = 64u - options.t0sz;
  const unsigned level = 1u + options.sl0;  // Arm's level 2 - SL0
  if (options.sl0 > kMostSl0 || bits > 48 || bits <= shift(level) ||
      bits > shift(level) + vmsa::kIndexBits + kMostConcatenatedBits) {
    return tl::unexpected(NoStart{FaultCode::kBadRoot});
  }
  if (address >> bits != 0) return tl::unexpected(NoStart{FaultCode::kInputRange});
  const uint64_t table = vmsa::TableIn(root, bits - shift(level));
  if (table >> options.output_bits != 0) return tl::unexpected(NoStart{FaultCode::kOutputRange});
  return WalkStart<Path>{table, static_cast<uint8_t>(level), (uint64_t{1} << bits) - 1, Path{}};
}

TableEntry VmsaStage2Format::decode(uint64_t raw, unsigned level, Path* path) const {
  const TableEntry entry = vmsa::DecodeShape(raw, level, options.output_bits, options.flags);
  if (entry.kind != TableEntry::Kind::kLeaf) return entry;
  const bool may_become_dirty = options.flags.sets_dirty && (raw & vmsa::kDirtyModifier) != 0;
  Rights rights = 0;
  if ((raw & kReadable) != 0) rights |= kMayRead;
  if ((raw & kWritable) != 0 || may_become_dirty) rights |= kMayWrite;
  if ((raw & kExecuteNever) == 0) rights |= kMayExecute;
  path->rights = rights;
  return entry;
}

uint64_t VmsaStage2Format::marked(uint64_t raw, bool is_leaf, bool writes) const {
  if (!is_leaf) return raw;
  if (options.flags.sets_access_flag) raw |= vmsa::kAccessFlag;
  const bool becomes_dirty =
      options.flags.sets_dirty && writes && (raw & vmsa::kDirtyModifier) != 0;
  return becomes_dirty ? raw | kWritable : raw;
}

}  // namespace mvgpu::domain
