#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

namespace mvgpu::domain {

// Who pays, for one word of 64 pages; the rule itself is stated in ledger_format.h.
//
// `rows` ascend and `held[i]` has the pages that rows[i] holds. `payer_bytes` has 64 bytes, or is
// null where none is named. Writes to paid[i] the pages that rows[i] pays for: disjoint, and their
// union is that of `held`. `paid` may not overlap `held`.
inline void DividePages(const uint8_t* rows, const uint64_t* held, unsigned count,
                        const uint8_t* payer_bytes, uint64_t* paid) {
  uint64_t taken = 0;
  for (unsigned i = 0; i < count; ++i) {
    paid[i] = held[i] & ~taken;
    taken |= held[i];
  }
  if (payer_bytes == nullptr || taken == 0) return;
  for (unsigned octet = 0; octet < 8; ++octet) {
    uint64_t bytes;
    std::memcpy(&bytes, payer_bytes + octet * 8, sizeof bytes);
    if (bytes == 0) continue;
    for (unsigned bit = octet * 8; bit < octet * 8 + 8; ++bit) {
      const uint64_t page = uint64_t{1} << bit;
      for (unsigned i = 0; i < count; ++i) {
        if (rows[i] + 1 != payer_bytes[bit] || (held[i] & page) == 0) continue;
        for (unsigned j = 0; j < count; ++j) paid[j] &= ~page;
        paid[i] |= page;
      }
    }
  }
}

inline uint64_t CountPages(uint64_t bits) { return static_cast<uint64_t>(std::popcount(bits)); }

}  // namespace mvgpu::domain
