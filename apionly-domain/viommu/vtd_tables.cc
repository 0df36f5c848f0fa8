#include "apionly-domain/viommu/vtd_tables.h"

#include <array>
#include <span>

namespace mvgpu::domain {

namespace {

tl::unexpected<VtdFault> Refuse(VtdReason reason, bool is_hidden = false) {
  return tl::unexpected(VtdFault{.reason = static_cast<uint8_t>(reason), .is_hidden = is_hidden});
}

template <size_t N>
bool HasReserved(const std::array<uint64_t, N>& words, const std::array<uint64_t, N>& reserved) {
  uint64_t set = 0;
  for (size_t i = 0; i < N; ++i) set |= words[i] & reserved[i];
  return set != 0;
}

}  // namespace

bool VtdTables::IsBeyondHost(uint64_t pointer) const {
  return abilities_.host_address_width < 64 && pointer >> abilities_.host_address_width != 0;
}

VtdTables::ContextResult VtdTables::context(vtd::RootAddress root, SourceId source) const {
  if (root.mode() == vtd::RootAddress::Mode::kAbort) {
    return Refuse(VtdReason::kNone, /*is_hidden=*/true);
  }
  if (root.mode() != vtd::RootAddress::Mode::kScalable || IsBeyondHost(root.table())) {
    return Refuse(VtdReason::kRootAddress);
  }
  vtd::RootEntry half;
  if (!memory_.load(root.table() + vtd::RootEntry::OffsetOf(source), std::span(&half.raw, 1))) {
    return Refuse(VtdReason::kRootAccess);
  }
  if (!half.is_present()) return Refuse(VtdReason::kRootNotPresent);
  if ((half.raw & vtd::RootEntry::kReserved) != 0 || IsBeyondHost(half.context_table())) {
    return Refuse(VtdReason::kRootReserved);
  }
  vtd::ContextEntry entry;
  if (!memory_.load(half.context_table() + vtd::ContextEntry::OffsetOf(source), entry.words)) {
    return Refuse(VtdReason::kContextAccess);
  }
  if (!entry.is_present()) return Refuse(VtdReason::kContextNotPresent, entry.hides_faults());
  if (HasReserved(entry.words, vtd::ContextEntry::kReserved) || IsBeyondHost(entry.directory())) {
    return Refuse(VtdReason::kContextReserved, entry.hides_faults());
  }
  return entry;
}

tl::expected<Pasid, VtdFault> VtdTables::pasid_of(const vtd::ContextEntry& context,
                                                  const VtdRequest& request) const {
  const bool hidden = context.hides_faults();
  if (request.kind == VtdRequest::Kind::kTranslation && !context.has_device_tlb()) {
    return Refuse(VtdReason::kNoDeviceTlb, hidden);
  }
  if (request.kind == VtdRequest::Kind::kPage && !context.takes_page_requests()) {
    return Refuse(VtdReason::kNoPageRequests, hidden);
  }
  if (!request.pasid) {
    if (context.rid_pasid() < context.pasids()) return context.rid_pasid();
    return Refuse(VtdReason::kRidPasidTooLarge, hidden);
  }
  if (!context.takes_pasids()) return Refuse(VtdReason::kNoPasids, hidden);
  if (*request.pasid >= context.pasids()) return Refuse(VtdReason::kPasidTooLarge, hidden);
  return *request.pasid;
}

tl::expected<vtd::PasidDirectoryEntry, VtdFault> VtdTables::Directory(
    const vtd::ContextEntry& context, Pasid pasid) const {
  const uint64_t at = context.directory() +
                      pasid / vtd::PasidDirectoryEntry::kPasids * vtd::PasidDirectoryEntry::kBytes;
  vtd::PasidDirectoryEntry entry;
  if (!memory_.load(at, std::span(&entry.raw, 1))) {
    return Refuse(VtdReason::kDirectoryAccess, context.hides_faults());
  }
  const bool hidden = context.hides_faults() || entry.hides_faults();
  if (!entry.is_present()) return Refuse(VtdReason::kDirectoryNotPresent, hidden);
  if ((entry.raw & vtd::PasidDirectoryEntry::kReserved) != 0 || IsBeyondHost(entry.table())) {
    return Refuse(VtdReason::kDirectoryReserved, hidden);
  }
  return entry;
}

std::optional<uint64_t> VtdTables::pasid_table(const vtd::ContextEntry& context,
                                               Pasid first) const {
  const auto entry = Directory(context, first);
  return entry ? std::optional(entry->table()) : std::nullopt;
}

VtdTables::PasidResult VtdTables::pasid_entry(const vtd::ContextEntry& context, Pasid pasid) const {
  const auto directory = Directory(context, pasid);
  if (!directory) return tl::unexpected(directory.error());
  const bool hidden = context.hides_faults() || directory->hides_faults();
  const uint64_t at =
      directory->table() + pasid % vtd::PasidDirectoryEntry::kPasids * vtd::PasidEntry::kBytes;
  vtd::PasidEntry entry;
  if (!memory_.load(at, entry.words)) return Refuse(VtdReason::kPasidAccess, hidden);
  const bool entry_hidden = hidden || entry.hides_faults();
  const VtdReason reason = problem(entry);
  if (reason != VtdReason::kNone) return Refuse(reason, entry_hidden);
  // What is above it counts for its later faults, too.
  if (hidden) entry.words[0] |= uint64_t{1} << 1;
  return entry;
}

VtdReason VtdTables::problem(const vtd::PasidEntry& entry) const {
  if (!entry.is_present()) return VtdReason::kPasidNotPresent;
  if (HasReserved(entry.words, vtd::PasidEntry::kReserved)) return VtdReason::kPasidReserved;
  return IsValid(entry) ? VtdReason::kNone : VtdReason::kPasidInvalid;
}

bool VtdTables::HasLevels(unsigned levels) const {
  return levels == 4 || (levels == 5 && abilities_.has_five_levels);
}

bool VtdTables::IsValid(const vtd::PasidEntry& entry) const {
  const auto translation = entry.translation();
  if (translation < vtd::Translation::kFirstStage || translation > vtd::Translation::kPassThrough) {
    return false;
  }
  if (entry.has_first_stage() && !HasLevels(entry.first_stage_levels())) return false;
  const unsigned levels = entry.second_stage_levels();
  return !entry.has_second_stage() || HasLevels(levels) ||
         (levels == 3 && abilities_.has_three_levels);
}

tl::expected<void, VtdFault> VtdTables::admit(const vtd::PasidEntry& entry,
                                              const VtdRequest& request) const {
  if (!request.pasid) return {};  // such requests have no attributes
  const bool hidden = entry.hides_faults();
  if (request.wanted.privileged && !entry.takes_supervisors()) {
    return Refuse(VtdReason::kNoSupervisors, hidden);
  }
  if ((request.wanted.rights & kMayExecute) != 0 && !entry.takes_execution()) {
    return Refuse(VtdReason::kNoExecution, hidden);
  }
  return {};
}

bool IsPrivileged(const vtd::ContextEntry& context, const VtdRequest& request) {
  return request.pasid ? request.wanted.privileged : context.is_rid_privileged();
}

}  // namespace mvgpu::domain
