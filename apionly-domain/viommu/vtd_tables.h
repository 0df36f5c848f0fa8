#pragma once

// From the sender of a request to the entry that says how it is translated (VT-d specification 4.1,
// section 3.4):
//
//   root table --bus--> context table --device, function--> PASID directory --PASID 19:6-->
//   PASID table --PASID 5:0--> PASID entry
//
// The tables are guest memory. Each entry is copied once and checked and used as it was copied; a
// look-up is four loads, whatever they say.

#include <cstdint>
#include <optional>

#include <tl/expected.hpp>

#include "apionly-domain/nested/guest_tables.h"
#include "apionly-domain/nested/table_walker.h"
#include "apionly-domain/viommu/vtd_entries.h"
#include "apionly-domain/viommu/vtd_fault.h"

namespace mvgpu::domain {

struct VtdRequest {
  enum class Kind : uint8_t {
    kUntranslated,  // an access of the device
    kTranslation,   // the device's own TLB asks (ATS)
    kPage,          // the device asks for a page (PRI)
  };
  SourceId source = 0;
  std::optional<Pasid> pasid = std::nullopt;  // at most vtd::kPasidBits bits
  uint64_t address = 0;
  Wanted wanted = {};
  Kind kind = Kind::kUntranslated;
};

// What the unit can do; what its capability registers tell the guest.
struct VtdAbilities {
  uint8_t host_address_width = 46;  // HAW: address bits from there on are reserved
  bool has_five_levels = true;      // of either stage
  bool has_three_levels = true;     // of the second stage
};

// Thread-safe, as the tables are.
class VtdTables {
 public:
  // The tables must outlive this.
  VtdTables(VtdAbilities abilities, const GuestTables* memory)
      : abilities_(abilities), memory_(*memory) {}

  using ContextResult = tl::expected<vtd::ContextEntry, VtdFault>;
  using PasidResult = tl::expected<vtd::PasidEntry, VtdFault>;

  // What the context entry of a sender is; it is present, with nothing reserved set.
  ContextResult context(vtd::RootAddress root, SourceId source) const;
  // Whether that entry takes the request at all.
  tl::expected<Pasid, VtdFault> pasid_of(const vtd::ContextEntry& context,
                                         const VtdRequest& request) const;
  // The PASID entry; it is present, valid, with nothing reserved set. REQUIRES: `pasid` is below
  // context.pasids().
  PasidResult pasid_entry(const vtd::ContextEntry& context, Pasid pasid) const;
  // Whether the entry takes the request; what its paging structures say comes after that.
  tl::expected<void, VtdFault> admit(const vtd::PasidEntry& entry, const VtdRequest& request) const;

  // What is wrong with an entry that was read; kNone if nothing is.
  VtdReason problem(const vtd::PasidEntry& entry) const;
  // The table for the 64 PASIDs from `first` on; nullopt where there is none. REQUIRES: `first` is
  // below context.pasids().
  std::optional<uint64_t> pasid_table(const vtd::ContextEntry& context, Pasid first) const;

  const VtdAbilities& abilities() const { return abilities_; }
  const GuestTables& memory() const { return memory_; }

 private:
  tl::expected<vtd::PasidDirectoryEntry, VtdFault> Directory(const vtd::ContextEntry& context,
                                                             Pasid pasid) const;
  bool IsBeyondHost(uint64_t pointer) const;
  bool IsValid(const vtd::PasidEntry& entry) const;
  bool HasLevels(unsigned levels) const;

  const VtdAbilities abilities_;
  const GuestTables& memory_;  // outlives this: contract of the constructor
};

// Whether requests of this entry are a supervisor's.
bool IsPrivileged(const vtd::ContextEntry& context, const VtdRequest& request);

}  // namespace mvgpu::domain
