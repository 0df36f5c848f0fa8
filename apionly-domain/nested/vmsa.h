#pragma once

// What both stages of VMSAv8-64 with the 4 KiB granule have in common, as an SMMUv3 walks them (Arm
// ARM, D8; SMMUv3 specification, 3.4). Levels here count upwards from the pages: what Arm calls
// level 3 is 0.
//
// The contiguous hint (bit 52) is a promise to TLBs that 16 entries go together. Nothing here
// relies on it: every page is what its own entry says.

#include <cstdint>
#include <optional>

#include "apionly-domain/nested/radix_walker.h"

namespace mvgpu::domain {

namespace vmsa {

inline constexpr unsigned kIndexBits = 9;
inline constexpr uint64_t kValid = 1 << 0;
inline constexpr uint64_t kTable = 1 << 1;                     // or, at the last level, a page
inline constexpr uint64_t kAddress = 0x0000'ffff'ffff'f000;    // 47:12
inline constexpr uint64_t kAccessFlag = 1 << 10;               // AF
inline constexpr uint64_t kDirtyModifier = uint64_t{1} << 51;  // DBM: writable, not dirty yet
inline constexpr uint64_t kContiguous = uint64_t{1} << 52;
inline constexpr unsigned kLargestBlockLevel = 2;  // 1 GiB

constexpr unsigned Shift(unsigned level) { return kPageShift + level * kIndexBits; }

// The two flags that hardware may keep (HTTU), and what is done about AF where it does not.
struct FlagOptions {
  bool sets_access_flag = false;     // HA
  bool sets_dirty = false;           // HD: a write turns DBM entries writable; with HA
  bool ignores_access_flag = false;  // AFFD
};

// Bits of a size code: IPS, S2PS, OAS.
constexpr std::optional<unsigned> SizeBits(unsigned code) {
  constexpr unsigned kBits[] = {32, 36, 40, 42, 44, 48, 52};
  if (code >= sizeof(kBits) / sizeof(kBits[0])) return std::nullopt;
  return kBits[code];
}

// What an entry is, before its rights are looked at: address size and access flag are checked, in
// that order.
TableEntry DecodeShape(uint64_t entry, unsigned level, unsigned output_bits, FlagOptions flags);

// The part of the root that is the table's address: aligned to the table's size.
constexpr uint64_t TableIn(uint64_t root, unsigned index_bits) {
  const uint64_t size = uint64_t{8} << index_bits;
  return root & 0x0000'ffff'ffff'ffff & ~((size < 64 ? 64 : size) - 1);
}

}  // namespace vmsa

// The type of the event that an SMMUv3 records for a fault (specification, 7.3).
uint8_t SmmuEventType(const Fault& fault);
// The CLASS field of that event: 1 for the fetch of a table of stage 1, 2 for the input address.
uint8_t SmmuEventClass(const Fault& fault);

}  // namespace mvgpu::domain
