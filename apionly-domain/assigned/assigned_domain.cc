#include "apionly-domain/assigned/assigned_domain.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>

namespace mvgpu::domain {

AssignedDomain::~AssignedDomain() {
  MutexLock lock(mutex_);
  MVGPU_CHECK(mappings_.empty() && used_.empty());
}

Result<void> AssignedDomain::on_map(const Mapping& mapping) {
  if (mapping.file == nullptr) return {};
  return space_->map_at(mapping.iova, mapping.file->host_address(mapping.file_offset),
                        mapping.access);
}

void AssignedDomain::on_map_done(const Mapping& mapping, bool mapped) {
  if (mapping.file == nullptr) return;
  if (!mapped) {
    space_->unmap(mapping.iova);
    space_->flush();
    return;
  }
  MutexLock lock(mutex_);
  mappings_.emplace(mapping.iova.start().value(), mapping);
}

Result<void> AssignedDomain::on_unmap(const Unmapping& unmapping) {
  {
    MutexLock lock(mutex_);
    if (used_.any(PagesOf(unmapping.range))) {
      return Fail(
          ErrorCode::kBusy,
          fmt::format("iova {:#x}-{:#x} cannot be unmapped from {}: a vgpu's device uses "
                      "its addresses",
                      unmapping.range.start().value(), unmapping.range.last().value(), name_));
    }
    going_ = unmapping.range;
  }
  for (const Mapping& mapping : unmapping.mappings) {
    if (mapping.file == nullptr) continue;
    MVGPU_RETURN_IF_ERROR(space_->isolate(mapping.iova));
  }
  return {};
}

void AssignedDomain::on_unmap_done(const Unmapping& unmapping, bool unmapped) {
  MutexLock lock(mutex_);
  going_.reset();
  if (!unmapped) return;
  for (const Mapping& mapping : unmapping.mappings) {
    if (mapping.file == nullptr) continue;
    space_->unmap(mapping.iova);
    RemoveLocked(mapping.iova);
  }
  space_->flush();
}

// Keeps the parts outside of the range of a mapping that it cuts.
void AssignedDomain::RemoveLocked(IovaRange range) {
  const auto found = std::prev(mappings_.upper_bound(range.start().value()));
  const Mapping whole = found->second;
  MVGPU_CHECK(whole.iova.contains(range));
  mappings_.erase(found);
  if (whole.iova.start() < range.start()) {
    const Iova last(range.start().value() - 1);
    mappings_.emplace(whole.iova.start().value(),
                      whole.slice(IovaRange::FromFirstAndLast(whole.iova.start(), last)));
  }
  if (range.last() < whole.iova.last()) {
    const Iova next = range.last() + 1;
    mappings_.emplace(next.value(),
                      whole.slice(IovaRange::FromFirstAndLast(next, whole.iova.last())));
  }
}

AssignedDomain::Found AssignedDomain::use(const PinnedRun& run, Access access) {
  MutexLock lock(mutex_);
  Found found = FindLocked(run, access);
  if (found.address) used_.add({found.address->page(), found.pages});
  return found;
}

// The VMM's own address of the page is the device's, if the device sees it at all.
AssignedDomain::Found AssignedDomain::FindLocked(const PinnedRun& run, Access access) const {
  const Found none{std::nullopt, run.iova_pages().count};
  if (going_ && going_->overlaps(run.iova)) return none;
  auto it = mappings_.upper_bound(run.iova.start().value());
  if (it != mappings_.begin() && std::prev(it)->second.iova.contains(run.iova.start())) {
    const Mapping& mapping = std::prev(it)->second;
    const IovaRange part = *mapping.iova.intersection(run.iova);
    const bool is_same = mapping.file->host_address(mapping.offset_of(part.start())) == run.host;
    const uint64_t pages = PagesIn(part.size());
    // Lost pages are no addresses either.
    if (is_same && Allows(mapping.access, access) && space_->shows(part, run.host)) {
      return {run.iova.start(), pages};
    }
    return {std::nullopt, pages};
  }
  if (it == mappings_.end() || !it->second.iova.overlaps(run.iova)) return none;
  return {std::nullopt, PagesIn(it->second.iova.start() - run.iova.start())};
}

void AssignedDomain::give_back(IovaRange addresses) {
  MutexLock lock(mutex_);
  used_.remove(PagesOf(addresses));
}

uint64_t AssignedDomain::used_pages() const {
  ReaderMutexLock lock(mutex_);
  return used_.total();
}

}  // namespace mvgpu::domain
