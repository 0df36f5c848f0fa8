#pragma once

#include <cstdint>
#include <cstring>
#include <span>

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

// std::popcount() without a table in memory or an instruction that not every processor has.
inline uint64_t CountPages(uint64_t bits) {
  bits -= bits >> 1 & 0x5555555555555555;
  bits = (bits & 0x3333333333333333) + (bits >> 2 & 0x3333333333333333);
  bits = (bits + (bits >> 4)) & 0x0f0f0f0f0f0f0f0f;
  return bits * 0x0101010101010101 >> 56;
}
// The same for many words: 16 at a time are added up byte by byte, which compilers make vectors of.
inline uint64_t CountPages(std::span<const uint64_t> words) {
  uint64_t pages = 0;
  while (words.size() >= 16) {
    uint64_t bytes = 0;  // at most 16 * 8 in each
    for (size_t i = 0; i < 16; ++i) {
      uint64_t bits = words[i];
      bits -= bits >> 1 & 0x5555555555555555;
      bits = (bits & 0x3333333333333333) + (bits >> 2 & 0x3333333333333333);
      bytes += (bits + (bits >> 4)) & 0x0f0f0f0f0f0f0f0f;
    }
    const uint64_t pairs = (bytes & 0x00ff00ff00ff00ff) + (bytes >> 8 & 0x00ff00ff00ff00ff);
    pages += pairs * 0x0001000100010001 >> 48;
    words = words.subspan(16);
  }
  for (const uint64_t bits : words) pages += CountPages(bits);
  return pages;
}

}  // namespace mvgpu::domain
