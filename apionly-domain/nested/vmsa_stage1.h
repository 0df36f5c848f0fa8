#pragma once

// Stage 1 of VMSAv8-64, 4 KiB granule, the lower address range. The root is TTB0 of a context
// descriptor.
//
// Rights: AP[2] takes the right to write, AP[1] gives users theirs; APTable and XNTable of upper
// entries take away for everything below.

#include <cstdint>
#include <optional>

#include "apionly-domain/nested/radix_walker.h"
#include "apionly-domain/nested/vmsa.h"

namespace mvgpu::domain {

struct VmsaStage1Format {
  struct Options {
    uint8_t t0sz = 16;             // addresses have 64 - T0SZ bits, 25 to 48
    uint8_t output_bits = 48;      // of IPS
    vmsa::FlagOptions flags = {};  // HA, HD, AFFD
  };
  struct Path {
    Rights user = kMayRead | kMayWrite | kMayExecute;
    Rights supervisor = kMayRead | kMayWrite | kMayExecute;
  };
  static constexpr uint8_t kStage = 1;

  unsigned shift(unsigned level) const { return vmsa::Shift(level); }
  unsigned index_bits(unsigned) const { return vmsa::kIndexBits; }
  tl::expected<WalkStart<Path>, NoStart> begin(uint64_t root, uint64_t address) const;
  TableEntry decode(uint64_t raw, unsigned level, Path* path) const;
  std::optional<FaultCode> refusal(Path path, Wanted wanted) const;
  Rights rights(Path path, bool privileged) const {
    return privileged ? path.supervisor : path.user;
  }
  uint64_t marked(uint64_t raw, bool is_leaf, bool writes) const;
  bool is_interrupt(uint64_t) const { return false; }

  static constexpr uint64_t kUser = 1 << 6;      // AP[1]
  static constexpr uint64_t kReadOnly = 1 << 7;  // AP[2]
  static constexpr uint64_t kPrivilegedExecuteNever = uint64_t{1} << 53;
  static constexpr uint64_t kExecuteNever = uint64_t{1} << 54;
  static constexpr uint64_t kTablePxn = uint64_t{1} << 59;
  static constexpr uint64_t kTableXn = uint64_t{1} << 60;
  static constexpr uint64_t kTableNoUser = uint64_t{1} << 61;    // APTable[0]
  static constexpr uint64_t kTableReadOnly = uint64_t{1} << 62;  // APTable[1]

  Options options;

 private:
  bool IsReadOnly(uint64_t leaf) const {
    const bool may_become_dirty = options.flags.sets_dirty && (leaf & vmsa::kDirtyModifier) != 0;
    return (leaf & kReadOnly) != 0 && !may_become_dirty;
  }
};

using VmsaStage1 = RadixWalker<VmsaStage1Format>;

}  // namespace mvgpu::domain
