#include "apionly-domain/viommu/vtd_fault.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

namespace mvgpu::domain {

namespace {

struct Reason {
  uint8_t code;
  bool is_recoverable;
  std::string_view name;
};

// The conditions are those that Linux names (drivers/iommu/intel/dmar.c). Recoverable are those
// that the specification's table of fault conditions answers with "success with R=W=U=S=0" (table
// 26 of 4.1), as QEMU has it since its patch "intel_iommu: Do not report recoverable faults to
// host" (2026): entries of PASID directory and table that are not present are among them. For
// 0x71, 0x75 to 0x79, 0x81, 0x82, 0x85, 0x86 and 0x91 no source but the rule itself was at hand.
constexpr std::array kReasons{
    Reason{0x00, false, "aborted"},
    Reason{0x30, false, "root table address not usable"},
    Reason{0x38, false, "root entry not accessible"},
    Reason{0x39, false, "root entry not present"},
    Reason{0x3a, false, "reserved bits in root entry"},
    Reason{0x40, false, "context entry not accessible"},
    Reason{0x41, false, "context entry not present"},
    Reason{0x42, false, "reserved bits in context entry"},
    Reason{0x44, false, "device TLB not enabled"},
    Reason{0x45, false, "PASIDs not enabled"},
    Reason{0x46, false, "PASID beyond the directory"},
    Reason{0x47, false, "page requests not enabled"},
    Reason{0x48, false, "PASID for requests without one beyond the directory"},
    Reason{0x50, false, "PASID directory entry not accessible"},
    Reason{0x51, true, "PASID directory entry not present"},
    Reason{0x52, false, "reserved bits in PASID directory entry"},
    Reason{0x58, false, "PASID entry not accessible"},
    Reason{0x59, true, "PASID entry not present"},
    Reason{0x5a, false, "reserved bits in PASID entry"},
    Reason{0x5b, false, "invalid PASID entry"},
    Reason{0x5c, false, "requests to execute not enabled"},
    Reason{0x5d, false, "supervisor requests not enabled"},
    Reason{0x70, false, "first-stage entry not accessible"},
    Reason{0x71, true, "first-stage entry not present"},
    Reason{0x72, false, "reserved bits in first-stage entry"},
    Reason{0x73, false, "first-stage root not accessible"},
    Reason{0x74, false, "first-stage table beyond the second stage"},
    Reason{0x75, true, "no read permission for the first-stage root"},
    Reason{0x76, true, "no read permission for a first-stage table"},
    Reason{0x77, true, "no write permission for a first-stage table"},
    Reason{0x78, false, "second-stage entry not accessible"},
    Reason{0x79, true, "second-stage entry not present"},
    Reason{0x7a, false, "reserved bits in second-stage entry"},
    Reason{0x7b, false, "second-stage root not usable"},
    Reason{0x80, false, "address not canonical"},
    Reason{0x81, true, "not for user requests"},
    Reason{0x82, true, "no execute permission"},
    Reason{0x83, false, "address beyond the host's"},
    Reason{0x84, false, "address beyond the second stage"},
    Reason{0x85, true, "no write permission"},
    Reason{0x86, true, "no read permission"},
    Reason{0x87, false, "interrupt range"},
    Reason{0x91, true, "accessed or dirty flag not set"},
};

const Reason* Find(uint8_t code) {
  const auto found = std::find_if(kReasons.begin(), kReasons.end(),
                                  [&](const Reason& reason) { return reason.code == code; });
  return found == kReasons.end() ? nullptr : &*found;
}

}  // namespace

std::string_view VtdReasonName(uint8_t reason) {
  const Reason* found = Find(reason);
  return found == nullptr ? std::string_view() : found->name;
}

bool VtdFault::is_recoverable() const {
  const Reason* found = Find(reason);
  return found != nullptr && found->is_recoverable;
}

std::string VtdFault::ToString() const {
  return fmt::format("{:#x} ({}) for device address {:#x}, stage {} with {:#x}", reason,
                     VtdReasonName(reason), address, stage, stage_input);
}

}  // namespace mvgpu::domain
