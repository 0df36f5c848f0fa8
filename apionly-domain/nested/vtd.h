#pragma once

// What both stages of Intel VT-d have in common (VT-d specification 4.1, chapter 9).

#include <cstdint>

#include "apionly-domain/nested/table_walker.h"

namespace mvgpu::domain {

namespace vtd {

inline constexpr unsigned kIndexBits = 9;
inline constexpr uint64_t kPageSizeBit = 1 << 7;             // PS: a page of 2 MiB or 1 GiB
inline constexpr uint64_t kAddress = 0x000f'ffff'ffff'f000;  // 51:12
inline constexpr unsigned kLargestPageLevel = 2;             // 1 GiB

constexpr unsigned Shift(unsigned level) { return kPageShift + level * kIndexBits; }
constexpr bool IsInterrupt(uint64_t address) { return address >> 20 == 0xfee; }

// The address in an entry; nullopt when it has bits beyond the host address width.
constexpr std::optional<uint64_t> AddressIn(uint64_t entry, unsigned host_address_width) {
  const uint64_t address = entry & kAddress;
  if (host_address_width < 64 && address >> host_address_width != 0) return std::nullopt;
  return address;
}

}  // namespace vtd

// How a PASID entry (or, in legacy mode, a context entry) wants requests translated.
enum class VtdMode : uint8_t { kLegacy, kFirstStage, kSecondStage, kNested };

// The fault reason that a remapping unit records (specification, chapter 7; Linux
// drivers/iommu/intel/dmar.c has their names). `first_levels` is the number of levels of the first
// stage, if there is one.
uint8_t VtdFaultReason(const Fault& fault, VtdMode mode, bool is_write, unsigned first_levels = 4);

}  // namespace mvgpu::domain
