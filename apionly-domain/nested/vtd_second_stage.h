#pragma once

// Second-stage tables of Intel VT-d, in scalable and in legacy mode, with 3, 4 or 5 levels. The
// root is SSPTPTR of a PASID entry, or the pointer of a context entry.
//
// An entry is there if it allows anything. What all entries on the way allow is allowed.

#include <cstdint>
#include <optional>

#include "apionly-domain/nested/radix_walker.h"
#include "apionly-domain/nested/vtd.h"

namespace mvgpu::domain {

struct VtdSecondStageFormat {
  struct Options {
    uint8_t levels = 4;               // 2 + AW: 3 (39 bits), 4 (48), 5 (57)
    uint8_t host_address_width = 52;  // HAW; address bits from there on are reserved
    bool keeps_accessed = false;      // SSADE: accessed and dirty flags are set
  };
  struct Path {
    Rights rights = kMayRead | kMayWrite | kMayExecute;
  };
  static constexpr uint8_t kStage = 2;

  unsigned shift(unsigned level) const { return vtd::Shift(level); }
  unsigned index_bits(unsigned) const { return vtd::kIndexBits; }
  tl::expected<WalkStart<Path>, NoStart> begin(uint64_t root, uint64_t address) const;
  TableEntry decode(uint64_t raw, unsigned level, Path* path) const;
  std::optional<FaultCode> refusal(Path path, Wanted wanted) const {
    return MissingRight(wanted.rights, path.rights);
  }
  Rights rights(Path path, bool) const { return path.rights; }
  uint64_t marked(uint64_t raw, bool is_leaf, bool writes) const {
    if (!options.keeps_accessed) return raw;
    return raw | kAccessed | (is_leaf && writes ? kDirty : 0);
  }
  bool is_interrupt(uint64_t out) const { return vtd::IsInterrupt(out); }

  static constexpr uint64_t kRights = kMayRead | kMayWrite | kMayExecute;  // R 0, W 1, X 2
  static constexpr uint64_t kAccessed = 1 << 8;
  static constexpr uint64_t kDirty = 1 << 9;

  Options options;
};

using VtdSecondStage = RadixWalker<VtdSecondStageFormat>;

}  // namespace mvgpu::domain
