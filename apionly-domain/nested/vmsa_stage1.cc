#include "apionly-domain/nested/vmsa_stage1.h"

namespace mvgpu::domain {

tl::expected<WalkStart<VmsaStage1Format::Path>, NoStart> VmsaStage1Format::begin(
    uint64_t root, uint64_t address) const {
  constexpr unsigned kFewestBits = 25;
  constexpr unsigned kMostBits = 48;
  const unsigned bits = 64u - options.t0sz;
  if (bits < kFewestBits || bits > kMostBits) return tl::unexpected(NoStart{FaultCode::kBadRoot});
  if (address >> bits != 0) return tl::unexpected(NoStart{FaultCode::kInputRange});
  const unsigned level = (bits - kPageShift - 1) / vmsa::kIndexBits;
  const uint64_t table = vmsa::TableIn(root, bits - shift(level));
  if (table >> options.output_bits != 0) return tl::unexpected(NoStart{FaultCode::kOutputRange});
  return WalkStart<Path>{table, static_cast<uint8_t>(level), (uint64_t{1} << bits) - 1, Path{}};
}

TableEntry VmsaStage1Format::decode(uint64_t raw, unsigned level, Path* path) const {
  const TableEntry entry = vmsa::DecodeShape(raw, level, options.output_bits, options.flags);
  const auto take = [](Rights* from, Rights rights, bool if_set) {
    if (if_set) *from &= static_cast<Rights>(~rights);
  };
  constexpr Rights kAll = kMayRead | kMayWrite | kMayExecute;
  const bool is_table = entry.kind == TableEntry::Kind::kTable;
  const bool read_only = is_table ? (raw & kTableReadOnly) != 0 : IsReadOnly(raw);
  take(&path->user, kMayWrite, read_only);
  take(&path->supervisor, kMayWrite, read_only);
  take(&path->user, kAll, is_table ? (raw & kTableNoUser) != 0 : (raw & kUser) == 0);
  take(&path->user, kMayExecute, (raw & (is_table ? kTableXn : kExecuteNever)) != 0);
  take(&path->supervisor, kMayExecute,
       (raw & (is_table ? kTablePxn : kPrivilegedExecuteNever)) != 0);
  return entry;
}

std::optional<FaultCode> VmsaStage1Format::refusal(Path path, Wanted wanted) const {
  const Rights allowed = rights(path, wanted.privileged);
  if (allowed == 0 && wanted.rights != 0) return FaultCode::kNotForUser;
  return MissingRight(wanted.rights, allowed);
}

uint64_t VmsaStage1Format::marked(uint64_t raw, bool is_leaf, bool writes) const {
  if (!is_leaf) return raw;
  if (options.flags.sets_access_flag) raw |= vmsa::kAccessFlag;
  const bool becomes_dirty =
      options.flags.sets_dirty && writes && (raw & vmsa::kDirtyModifier) != 0;
  return becomes_dirty ? raw & ~kReadOnly : raw;
}

}  // namespace mvgpu::domain
