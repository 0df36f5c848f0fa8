#pragma once

// First-stage tables of Intel VT-d in scalable mode: those of the processor, with 4 or 5 levels.
// The root is FSPTPTR of a PASID entry.
//
// Accessed is set in every entry that is used, dirty in the last one by a write. What a request may
// do: read where all entries are for users (U/S), write where all are writable too, execute where
// none is XD. A supervisor's request needs neither U/S nor, without WPE, R/W.

#include <cstdint>
#include <optional>

#include "apionly-domain/nested/radix_walker.h"
#include "apionly-domain/nested/vtd.h"

namespace mvgpu::domain {

struct VtdFirstStageFormat {
  struct Options {
    uint8_t levels = 4;               // 4 + FSPM: 4 or 5
    uint8_t host_address_width = 52;  // HAW; address bits from there on are reserved
    bool write_protect = false;       // WPE: R/W binds supervisors too
    // The result goes through a second stage: where interrupts are is not decided here.
    bool is_nested = false;
  };
  struct Path {
    bool writable = true;
    bool user = true;
    bool executable = true;
  };
  static constexpr uint8_t kStage = 1;

  unsigned shift(unsigned level) const { return vtd::Shift(level); }
  unsigned index_bits(unsigned) const { return vtd::kIndexBits; }
  tl::expected<WalkStart<Path>, NoStart> begin(uint64_t root, uint64_t address) const;
  TableEntry decode(uint64_t raw, unsigned level, Path* path) const;
  std::optional<FaultCode> refusal(Path path, Wanted wanted) const;
  Rights rights(Path path, bool privileged) const;
  uint64_t marked(uint64_t raw, bool is_leaf, bool writes) const {
    return raw | kAccessed | (is_leaf && writes ? kDirty : 0);
  }
  bool is_interrupt(uint64_t out) const { return !options.is_nested && vtd::IsInterrupt(out); }

  static constexpr uint64_t kPresent = 1 << 0;
  static constexpr uint64_t kWritable = 1 << 1;
  static constexpr uint64_t kUser = 1 << 2;  // U/S
  static constexpr uint64_t kAccessed = 1 << 5;
  static constexpr uint64_t kDirty = 1 << 6;
  static constexpr uint64_t kExecuteDisable = uint64_t{1} << 63;
  static constexpr uint64_t kLargePat = 1 << 12;  // of large pages; not an address bit there

  Options options;
};

using VtdFirstStage = RadixWalker<VtdFirstStageFormat>;

}  // namespace mvgpu::domain
