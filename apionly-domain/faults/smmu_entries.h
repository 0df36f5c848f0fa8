#pragma once

// What an SMMUv3 reads about a stream and its substreams (Arm IHI 0070, 5.2 and 5.4): which stages
// translate, with which tables, and whether an access that finds no translation stalls. Copies of
// single entries with names for their bits; they are the guest's and may say anything, so whatever
// does not exist is nullopt.

#include <array>
#include <cstdint>
#include <optional>

#include "apionly-domain/base/error.h"
#include "apionly-domain/nested/vmsa_stage1.h"
#include "apionly-domain/nested/vmsa_stage2.h"

namespace mvgpu::domain {

// Stream table entry (STE).
struct SmmuStreamEntry {
  static constexpr uint64_t kBytes = 64;
  enum class Config : uint8_t { kAbort = 0, kBypass = 4, kStage1 = 5, kStage2 = 6, kNested = 7 };
  enum class WithoutSubstream : uint8_t { kTerminate = 0, kBypass = 1, kFirstDescriptor = 2 };
  std::array<uint64_t, 8> words{};

  bool is_valid() const { return (words[0] & 1) != 0; }
  // nullopt: a value that is reserved.
  std::optional<Config> config() const;
  bool has_stage1() const { return config() == Config::kStage1 || config() == Config::kNested; }
  bool has_stage2() const { return config() == Config::kStage2 || config() == Config::kNested; }
  // How many context descriptors there are (S1CDMax).
  uint64_t descriptors() const { return uint64_t{1} << (words[0] >> 59); }
  // What becomes of an access without a substream where there are several (S1DSS); nullopt:
  // reserved.
  std::optional<WithoutSubstream> without_substream() const;
  // Where the descriptor of a substream is; an address of stage 2 if that translates. nullopt:
  // beyond the table, no stage 1, or a table of two levels.
  std::optional<uint64_t> descriptor_of(uint32_t substream) const;
  uint16_t vmid() const { return static_cast<uint16_t>(words[2]); }
  uint64_t stage2_root() const { return words[3] & 0x000f'ffff'ffff'fff0; }
  // nullopt: no stage 2 with tables of 64 bits and pages of 4 KiB.
  std::optional<VmsaStage2Format::Options> stage2() const;

  bool keeps_stage1_from_stalling() const { return (words[1] >> 27 & 1) != 0; }  // S1STALLD
  bool stalls_stage2() const { return (words[2] >> 57 & 1) != 0; }               // S2S
  bool records_stage2() const { return (words[2] >> 58 & 1) != 0; }              // S2R
};

// Context descriptor (CD).
struct SmmuContextDescriptor {
  static constexpr uint64_t kBytes = 64;
  std::array<uint64_t, 8> words{};

  bool is_valid() const { return (words[0] >> 31 & 1) != 0; }
  uint16_t asid() const { return static_cast<uint16_t>(words[0] >> 48); }
  uint64_t root() const { return words[1] & 0x000f'ffff'ffff'fff0; }  // TTB0
  // nullopt: no walks from TTB0 with tables of 64 bits and pages of 4 KiB.
  std::optional<VmsaStage1Format::Options> stage1() const;
  bool aborts() const { return (words[0] >> 46 & 1) != 0; }   // A
  bool records() const { return (words[0] >> 45 & 1) != 0; }  // R
  // Whether an access that finds no translation in stage 1 stalls: the descriptor asks for it, and
  // the stream does not forbid it.
  bool stalls(const SmmuStreamEntry& stream) const {
    return (words[0] >> 44 & 1) != 0 && !stream.keeps_stage1_from_stalling();
  }
};

// The commands that take translations out of the TLB.
struct SmmuInvalidation {
  using Words = std::array<uint64_t, 2>;
  enum class Kind : uint8_t {
    kAsid = 0x11,     // TLBI_NH_ASID
    kAddress = 0x12,  // TLBI_NH_VA
    kVmAll = 0x28,    // TLBI_S12_VMALL
    kStage2 = 0x2a,   // TLBI_S2_IPA
  };
  Kind kind = Kind::kAddress;
  uint16_t vmid = 0;
  uint16_t asid = 0;       // of kAsid and kAddress
  bool leaf_only = false;  // of kAddress and kStage2
  uint64_t page = 0;       // likewise; an address
  bool operator==(const SmmuInvalidation&) const = default;

  Words encode() const;
  // Error: kInvalid, another command.
  static Result<SmmuInvalidation> Decode(const Words& words);
};

}  // namespace mvgpu::domain
