// What the VMM maps, and takes away, of a FaultingDomain.

#include <fmt/format.h>

#include <algorithm>
#include <iterator>

#include "apionly-domain/faults/faulting_domain.h"

namespace mvgpu::domain {

Result<FaultingDomain::Place> FaultingDomain::PlaceOf(uint64_t page, Access access) const {
  const Iova iova(BytesIn(page));
  ErrorCode error = ErrorCode::kNotMapped;
  Access mapped = access;
  {
    SpinLockHold lock(mappings_lock_);
    const auto next = mappings_.upper_bound(iova.value());
    if (next != mappings_.begin() && std::prev(next)->second.iova.contains(iova)) {
      const Mapping& mapping = std::prev(next)->second;
      mapped = mapping.access;
      if (IsGoingLocked(RangeOf({page, 1}))) {
        error = ErrorCode::kBusy;
      } else if (mapping.file == nullptr) {
        error = ErrorCode::kNotReachable;
      } else if (!Allows(mapping.access, access)) {
        error = ErrorCode::kPermission;
      } else {
        return Place{PagesOf(mapping.iova), mapping.access,
                     mapping.file->host_address(mapping.file_offset), !going_.empty()};
      }
    }
  }
  return PlaceError(error, page, access, mapped);
}

tl::unexpected<Error> FaultingDomain::PlaceError(ErrorCode code, uint64_t page, Access wanted,
                                                 Access mapped) const {
  const uint64_t iova = BytesIn(page);
  switch (code) {
    case ErrorCode::kBusy:
      return Fail(code, fmt::format("{}: iova {:#x} is about to be unmapped", options_.name, iova));
    case ErrorCode::kNotReachable:
      return Fail(code, fmt::format("{}: a fault at iova {:#x}, in a mapping without a file",
                                    options_.name, iova));
    case ErrorCode::kPermission:
      return Fail(code, fmt::format("{}: a {} fault at iova {:#x}, which is mapped {}",
                                    options_.name, AccessName(wanted), iova, AccessName(mapped)));
    default:
      return Fail(code, fmt::format("{}: a fault at iova {:#x}, where the vmm maps nothing",
                                    options_.name, iova));
  }
}

bool FaultingDomain::IsGoingLocked(IovaRange range) const {
  return std::any_of(going_.begin(), going_.end(),
                     [&](const IovaRange& going) { return going.overlaps(range); });
}

void FaultingDomain::BeginGoing(IovaRange range) {
  SpinLockHold lock(mappings_lock_);
  going_.push_back(range);
}

void FaultingDomain::EndGoing(IovaRange range) {
  SpinLockHold lock(mappings_lock_);
  const auto found = std::find(going_.begin(), going_.end(), range);
  if (found != going_.end()) going_.erase(found);
}

void FaultingDomain::on_map_done(const Mapping& mapping, bool mapped) {
  if (!mapped) return;
  SpinLockHold lock(mappings_lock_);
  mappings_.emplace(mapping.iova.start().value(), mapping);
}

void FaultingDomain::on_revoke(IovaRange range) { count_.revoked += TakeOutRange(range); }

Result<void> FaultingDomain::on_unmap(const Unmapping& unmapping) {
  BeginGoing(unmapping.range);
  on_revoke(unmapping.range);
  return {};
}

void FaultingDomain::on_unmap_done(const Unmapping& unmapping, bool unmapped) {
  if (unmapped) {
    SpinLockHold lock(mappings_lock_);
    for (const Mapping& going : unmapping.mappings) {
      const auto found = std::prev(mappings_.upper_bound(going.iova.start().value()));
      const Mapping whole = found->second;
      mappings_.erase(found);
      const auto keep = [&](Iova first, Iova last) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mappings_lock_) {
        mappings_.emplace(first.value(), whole.slice(IovaRange::FromFirstAndLast(first, last)));
      };
      if (whole.iova.start() < going.iova.start()) {
        keep(whole.iova.start(), Iova(going.iova.start().value() - 1));
      }
      if (going.iova.last() < whole.iova.last()) keep(going.iova.last() + 1, whole.iova.last());
    }
  }
  EndGoing(unmapping.range);
}

}  // namespace mvgpu::domain
