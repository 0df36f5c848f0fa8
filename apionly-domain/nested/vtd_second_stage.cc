#include "apionly-domain/nested/vtd_second_stage.h"

namespace mvgpu::domain {

tl::expected<WalkStart<VtdSecondStageFormat::Path>, NoStart> VtdSecondStageFormat::begin(
    uint64_t root, uint64_t address) const {
  const unsigned width = vtd::Shift(options.levels);
  if (address >> width != 0) return tl::unexpected(NoStart{FaultCode::kInputRange});
  const auto table = vtd::AddressIn(root, options.host_address_width);
  if (!table || root != *table) return tl::unexpected(NoStart{FaultCode::kBadRoot});
  return WalkStart<Path>{*table, static_cast<uint8_t>(options.levels - 1),
                         (uint64_t{1} << width) - 1, Path{}};
}

TableEntry VtdSecondStageFormat::decode(uint64_t raw, unsigned level, Path* path) const {
  if ((raw & kRights) == 0) return TableEntry::Hole();
  const bool is_large = level > 0 && (raw & vtd::kPageSizeBit) != 0;
  const auto address = vtd::AddressIn(raw, options.host_address_width);
  if (!address || (is_large && (level > vtd::kLargestPageLevel ||
                                (*address & ((uint64_t{1} << shift(level)) - 1)) != 0))) {
    return TableEntry::Bad(FaultCode::kReserved);
  }
  path->rights &= static_cast<Rights>(raw & kRights);
  return is_large || level == 0 ? TableEntry::Leaf(*address) : TableEntry::Table(*address);
}

}  // namespace mvgpu::domain
