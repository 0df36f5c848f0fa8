#pragma once

#include <cstdint>

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"

namespace mvgpu::domain {

// What guest and host say about a page in the DMA tracking table: how often the guest has mapped it
// for a device, whether it did so lately, and whether the host has it pinned.
namespace tracked {
inline constexpr uint32_t kCountMask = 0xffff;   // written by the guest
inline constexpr uint32_t kAccessed = 1u << 30;  // set by the guest, cleared by the host
inline constexpr uint32_t kPinned = 1u << 31;    // written by the host
}  // namespace tracked

// CoIOMMU's DMA tracking table (DTT), as crosvm and the driver of ChromeOS guests have it: a radix
// tree in guest memory, indexed by guest frame numbers. Its upper tables have 512 entries of 8
// bytes (bit 0: present, bits 63:12: the next table), its leaves 1024 words of 4 bytes.
//
// All of it is the guest's to write at any time. Each entry is read once; a word is changed only by
// compare-and-exchange, and a guest that changes words all the time makes that fail, not last.
//
// Thread-safe.
class TrackingTable {
 public:
  static constexpr unsigned kLeafBits = 10;
  static constexpr unsigned kUpperBits = 9;
  static constexpr unsigned kMostLevels = 5;

  // How many levels a guest with so many bits of physical addresses needs.
  static constexpr unsigned LevelsFor(unsigned address_bits) {
    const unsigned upper_bits = address_bits - kPageShift - kLeafBits;
    return (upper_bits + kUpperBits - 1) / kUpperBits + 1;
  }
  static constexpr unsigned IndexOf(uint64_t frame, unsigned level) {
    if (level == 0) return frame & ((1u << kLeafBits) - 1);
    return frame >> (kLeafBits + kUpperBits * (level - 1)) & ((1u << kUpperBits) - 1);
  }

  // `root` is guest-physical. `memory` outlives the table. REQUIRES: 2 <= levels <= kMostLevels.
  TrackingTable(ApiOnlyDomain* memory, uint64_t root, unsigned levels)
      : memory_(memory), root_(root & ~kPageMask), levels_(levels) {}

  // Where the word of a frame stands. Errors: kInvalid (a frame beyond the levels), kNotMapped (an
  // entry is not present), those of ApiOnlyDomain::load_words().
  Result<Iova> find(uint64_t frame) const;
  Result<uint32_t> load(Iova word) const;
  // Stores `desired` if the word is `expected`; returns what it was. Also kBusy: the words beside
  // it change all the time.
  Result<uint32_t> compare_exchange(Iova word, uint32_t expected, uint32_t desired);
  // Clears and sets bits in one step; returns what the word was. Also kBusy: it changes all the
  // time.
  Result<uint32_t> change(Iova word, uint32_t clear, uint32_t set);

 private:
  ApiOnlyDomain* memory_;  // outlives this
  uint64_t root_;
  unsigned levels_;
};

}  // namespace mvgpu::domain
