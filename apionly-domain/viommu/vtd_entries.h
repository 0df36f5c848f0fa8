#pragma once

// The tables in guest memory that say how requests are translated, in scalable mode (VT-d
// specification 4.1, chapter 9): root table, context tables, PASID directory, PASID tables. These
// are copies of single entries with names for their bits; whether they make sense is for
// vtd_tables.h to say.

#include <array>
#include <cstddef>
#include <cstdint>

#include "apionly-domain/base/address.h"

namespace mvgpu::domain {

using SourceId = uint16_t;  // who sent a request: bus 15:8, device 7:3, function 2:0
using DomainId = uint16_t;  // what a guest tags translations with
using Pasid = uint32_t;     // 20 bits

namespace vtd {

inline constexpr unsigned kPasidBits = 20;
inline constexpr Pasid kPasidMask = (1u << kPasidBits) - 1;

constexpr uint64_t Field(uint64_t word, unsigned first, unsigned bits) {
  return word >> first & ((uint64_t{1} << bits) - 1);
}
constexpr bool Bit(uint64_t word, unsigned bit) { return (word >> bit & 1) != 0; }

// RTADDR_REG: where the root table is, and in which mode it is read.
struct RootAddress {
  enum class Mode : uint8_t { kLegacy = 0, kScalable = 1, kReserved = 2, kAbort = 3 };
  uint64_t raw = 0;

  uint64_t table() const { return raw & ~kPageMask; }
  Mode mode() const { return static_cast<Mode>(Field(raw, 10, 2)); }
};

// Half of a root entry: for device functions 0 to 0x7f, or for those above.
struct RootEntry {
  static constexpr size_t kBytes = 16;  // both halves
  static constexpr uint64_t kReserved = 0xffe;
  uint64_t raw = 0;

  static constexpr uint64_t OffsetOf(SourceId source) {
    return uint64_t{source} / 256 * kBytes + (source & 0x80) / 0x80 * sizeof(uint64_t);
  }
  bool is_present() const { return Bit(raw, 0); }
  uint64_t context_table() const { return raw & ~kPageMask; }
};

struct ContextEntry {
  static constexpr size_t kBytes = 32;
  static constexpr std::array<uint64_t, 4> kReserved{0x1e0, ~uint64_t{0x1f'ffff}, ~uint64_t{0},
                                                     ~uint64_t{0}};
  std::array<uint64_t, 4> words{};

  static constexpr uint64_t OffsetOf(SourceId source) { return (source & 0x7f) * kBytes; }
  bool is_present() const { return Bit(words[0], 0); }
  bool hides_faults() const { return Bit(words[0], 1); }         // FPD, valid also if not present
  bool has_device_tlb() const { return Bit(words[0], 2); }       // DTE
  bool takes_pasids() const { return Bit(words[0], 3); }         // PASIDE
  bool takes_page_requests() const { return Bit(words[0], 4); }  // PRE
  // PDTS: as many as 2^(PDTS + 7) entries of the directory, of 64 PASIDs each.
  Pasid pasids() const { return Pasid{64} << (Field(words[0], 9, 3) + 7); }
  uint64_t directory() const { return words[0] & ~kPageMask; }
  Pasid rid_pasid() const { return static_cast<Pasid>(Field(words[1], 0, kPasidBits)); }
  bool is_rid_privileged() const { return Bit(words[1], 20); }  // RID_PRIV
};

struct PasidDirectoryEntry {
  static constexpr size_t kBytes = 8;
  static constexpr uint64_t kReserved = 0xffc;
  static constexpr unsigned kPasids = 64;  // for which an entry stands
  uint64_t raw = 0;

  bool is_present() const { return Bit(raw, 0); }
  bool hides_faults() const { return Bit(raw, 1); }
  uint64_t table() const { return raw & ~kPageMask; }
};

// PGTT.
enum class Translation : uint8_t {
  kFirstStage = 1,
  kSecondStage = 2,
  kNested = 3,
  kPassThrough = 4,
};

struct PasidEntry {
  static constexpr size_t kBytes = 64;
  // With EAFE: this unit keeps no extended accessed flags. Memory types (CD to PAT) are not its
  // business, and may be anything.
  static constexpr std::array<uint64_t, 8> kReserved{0xc00,        0x7f'0000,    0xf80,
                                                     ~uint64_t{0}, ~uint64_t{0}, ~uint64_t{0},
                                                     ~uint64_t{0}, ~uint64_t{0}};
  std::array<uint64_t, 8> words{};

  bool is_present() const { return Bit(words[0], 0); }
  bool hides_faults() const { return Bit(words[0], 1); }  // valid also if not present
  uint8_t second_stage_width() const { return static_cast<uint8_t>(Field(words[0], 2, 3)); }  // AW
  Translation translation() const { return static_cast<Translation>(Field(words[0], 6, 3)); }
  bool keeps_second_accessed() const { return Bit(words[0], 9); }  // SSADE
  uint64_t second_stage() const { return words[0] & ~kPageMask; }
  DomainId domain() const { return static_cast<DomainId>(words[1]); }
  bool takes_supervisors() const { return Bit(words[2], 0); }                               // SRE
  bool takes_execution() const { return Bit(words[2], 1); }                                 // ERE
  uint8_t first_stage_mode() const { return static_cast<uint8_t>(Field(words[2], 2, 2)); }  // FSPM
  bool write_protects() const { return Bit(words[2], 4); }                                  // WPE
  uint64_t first_stage() const { return words[2] & ~kPageMask; }  // nested: guest-physical

  uint8_t second_stage_levels() const { return static_cast<uint8_t>(2 + second_stage_width()); }
  uint8_t first_stage_levels() const { return static_cast<uint8_t>(4 + first_stage_mode()); }
  bool has_first_stage() const {
    return translation() == Translation::kFirstStage || translation() == Translation::kNested;
  }
  bool has_second_stage() const {
    return translation() == Translation::kSecondStage || translation() == Translation::kNested;
  }
  bool operator==(const PasidEntry&) const = default;
};

}  // namespace vtd
}  // namespace mvgpu::domain
