#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace mvgpu::domain {

// Why a request was not translated, as fault records have it (VT-d specification, chapter 7; Linux
// drivers/iommu/intel/dmar.c has the names). Those that walks of paging structures end in come from
// VtdFaultReason(); here are those before a walk, and the few that are asked for by name.
enum class VtdReason : uint8_t {
  kNone = 0,            // also: abort mode, for which there is no record
  kRootAddress = 0x30,  // RTADDR: beyond memory, or a mode that this unit has not
  kRootAccess = 0x38,
  kRootNotPresent = 0x39,
  kRootReserved = 0x3a,
  kContextAccess = 0x40,
  kContextNotPresent = 0x41,
  kContextReserved = 0x42,
  kNoDeviceTlb = 0x44,     // DTE is clear: no translation requests
  kNoPasids = 0x45,        // PASIDE is clear: no requests with PASID
  kPasidTooLarge = 0x46,   // for PDTS
  kNoPageRequests = 0x47,  // PRE is clear
  kRidPasidTooLarge = 0x48,
  kDirectoryAccess = 0x50,
  kDirectoryNotPresent = 0x51,
  kDirectoryReserved = 0x52,
  kPasidAccess = 0x58,
  kPasidNotPresent = 0x59,
  kPasidReserved = 0x5a,
  kPasidInvalid = 0x5b,   // a translation type or width that does not exist
  kNoExecution = 0x5c,    // ERE is clear
  kNoSupervisors = 0x5d,  // SRE is clear
  kBeyondHost = 0x83,     // pass-through: above the widest address
  kInterruptRange = 0x87,
};

struct VtdFault {
  uint8_t reason = 0;        // a VtdReason, or one of VtdFaultReason()
  uint8_t stage = 0;         // of the walk that failed; 0: there was none yet
  uint64_t address = 0;      // what the device used
  uint64_t stage_input = 0;  // what went into that stage
  bool is_hidden = false;    // FPD: the guest does not want to hear of it

  bool is(VtdReason other) const { return reason == static_cast<uint8_t>(other); }
  // Whether a device's translation request is answered with "no rights" instead of an error: the
  // device may ask for the page.
  bool is_recoverable() const;
  std::string ToString() const;
  bool operator==(const VtdFault&) const = default;
};

// The condition in words; empty for a code without meaning.
std::string_view VtdReasonName(uint8_t reason);

}  // namespace mvgpu::domain
