#pragma once

// Stage 2 of VMSAv8-64, 4 KiB granule. The root is S2TTB of a stream table entry; up to 16 tables
// of the first level lie one behind the other.

#include <cstdint>
#include <optional>

#include "apionly-domain/nested/radix_walker.h"
#include "apionly-domain/nested/vmsa.h"

namespace mvgpu::domain {

struct VmsaStage2Format {
  struct Options {
    uint8_t t0sz = 24;             // S2T0SZ: addresses have 64 - T0SZ bits
    uint8_t sl0 = 1;               // S2SL0: Arm's level 2 - SL0 is the first
    uint8_t output_bits = 48;      // of S2PS
    vmsa::FlagOptions flags = {};  // S2HA, S2HD, S2AFFD
  };
  struct Path {
    Rights rights = kMayRead | kMayWrite | kMayExecute;
  };
  static constexpr uint8_t kStage = 2;

  unsigned shift(unsigned level) const { return vmsa::Shift(level); }
  unsigned index_bits(unsigned) const { return vmsa::kIndexBits; }
  tl::expected<WalkStart<Path>, NoStart> begin(uint64_t root, uint64_t address) const;
  TableEntry decode(uint64_t raw, unsigned level, Path* path) const;
  std::optional<FaultCode> refusal(Path path, Wanted wanted) const {
    return MissingRight(wanted.rights, path.rights);
  }
  Rights rights(Path path, bool) const { return path.rights; }
  uint64_t marked(uint64_t raw, bool is_leaf, bool writes) const;
  bool is_interrupt(uint64_t) const { return false; }

  static constexpr uint64_t kReadable = 1 << 6;                 // S2AP[0]
  static constexpr uint64_t kWritable = 1 << 7;                 // S2AP[1]
  static constexpr uint64_t kExecuteNever = uint64_t{1} << 54;  // XN[1]

  Options options;
};

using VmsaStage2 = RadixWalker<VmsaStage2Format>;

}  // namespace mvgpu::domain
