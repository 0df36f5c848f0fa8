#include "apionly-domain/nested/vtd_first_stage.h"

namespace mvgpu::domain {

tl::expected<WalkStart<VtdFirstStageFormat::Path>, NoStart> VtdFirstStageFormat::begin(
    uint64_t root, uint64_t address) const {
  const unsigned width = vtd::Shift(options.levels);
  const uint64_t half = uint64_t{1} << (width - 1);
  // Canonical: bit width - 1 goes on to bit 63.
  if (address >= half && address < ~half + 1) {
    return tl::unexpected(NoStart{FaultCode::kInputRange, ~half + 1});
  }
  const auto table = vtd::AddressIn(root, options.host_address_width);
  if (!table || root != *table) return tl::unexpected(NoStart{FaultCode::kBadRoot});
  return WalkStart<Path>{*table, static_cast<uint8_t>(options.levels - 1),
                         (uint64_t{1} << width) - 1, Path{}};
}

TableEntry VtdFirstStageFormat::decode(uint64_t raw, unsigned level, Path* path) const {
  if ((raw & kPresent) == 0) return TableEntry::Hole();
  const bool is_large = level > 0 && (raw & vtd::kPageSizeBit) != 0;
  auto address = vtd::AddressIn(raw, options.host_address_width);
  if (!address || (is_large && level > vtd::kLargestPageLevel)) {
    return TableEntry::Bad(FaultCode::kReserved);
  }
  if (is_large) {
    *address &= ~kLargePat;
    if ((*address & ((uint64_t{1} << shift(level)) - 1)) != 0) {
      return TableEntry::Bad(FaultCode::kReserved);
    }
  }
  path->writable &= (raw & kWritable) != 0;
  path->user &= (raw & kUser) != 0;
  path->executable &= (raw & kExecuteDisable) == 0;
  return is_large || level == 0 ? TableEntry::Leaf(*address) : TableEntry::Table(*address);
}

std::optional<FaultCode> VtdFirstStageFormat::refusal(Path path, Wanted wanted) const {
  if (wanted.rights == 0) return std::nullopt;
  if (!path.user && !wanted.privileged) return FaultCode::kNotForUser;
  const Rights missing = wanted.rights & static_cast<Rights>(~rights(path, wanted.privileged));
  if ((missing & kMayWrite) != 0) return FaultCode::kNoWrite;
  if ((missing & kMayExecute) != 0) return FaultCode::kNoExecute;
  return std::nullopt;
}

Rights VtdFirstStageFormat::rights(Path path, bool privileged) const {
  if (!path.user && !privileged) return 0;
  Rights allowed = kMayRead;
  if (path.writable || (privileged && !options.write_protect)) allowed |= kMayWrite;
  if (path.executable) allowed |= kMayExecute;
  return allowed;
}

}  // namespace mvgpu::domain
