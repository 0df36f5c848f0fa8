#include "apionly-domain/viommu/vtd_caches.h"

#include <array>

#include "apionly-domain/nested/vtd.h"

namespace mvgpu::domain {

namespace {

// Sizes of pages, smallest first.
constexpr std::array<uint8_t, 3> kShifts{vtd::Shift(0), vtd::Shift(1), vtd::Shift(2)};

// The largest of them within a span.
uint8_t ShiftFor(uint64_t span) {
  uint8_t shift = kShifts[0];
  for (const uint8_t other : kShifts) {
    if (span >> other != 0) shift = other;
  }
  return shift;
}

}  // namespace

VtdCaches::Tag VtdCaches::TagOf(const vtd::PasidEntry& entry, Pasid pasid, bool privileged) {
  if (!entry.has_first_stage()) return {.domain = entry.domain()};
  return {entry.domain(), pasid, privileged};
}

bool VtdCaches::PageKey::overlaps(const IovaRange& range) const {
  const uint64_t start = page << shift;
  const uint64_t last = start | ((uint64_t{1} << shift) - 1);
  return start <= range.last().value() && range.start().value() <= last;
}

std::optional<Leaf> VtdCaches::page(const Tag& tag, uint64_t address, Rights wanted) const {
  for (const uint8_t shift : kShifts) {
    const Page* found = pages_.find({tag, address >> shift, shift});
    if (found == nullptr || (wanted & ~found->marked) != 0) continue;
    const uint64_t span = uint64_t{1} << shift;
    return Leaf{found->frame | (address & (span - 1)), span, found->rights, found->marked};
  }
  return std::nullopt;
}

void VtdCaches::remember(const Tag& tag, uint64_t address, const Leaf& leaf) {
  const uint8_t shift = ShiftFor(leaf.span);
  const uint64_t mask = (uint64_t{1} << shift) - 1;
  const PageKey key{tag, address >> shift, shift};
  pages_.insert(key, {leaf.out & ~mask, leaf.rights, leaf.marked});
}

// Entries of scalable mode have no domain: those of all go, as of all functions that a mask names.
void VtdCaches::invalidate(const ContextInvalidation& invalidation) {
  if (invalidation.granularity != ContextInvalidation::Granularity::kDevice) {
    contexts_.clear();
    return;
  }
  const SourceId mask = invalidation.source_mask();
  contexts_.erase_if([&](SourceId source, const vtd::ContextEntry&) {
    return ((source ^ invalidation.source) & mask) == 0;
  });
}

void VtdCaches::invalidate(const PasidCacheInvalidation& invalidation) {
  using Granularity = PasidCacheInvalidation::Granularity;
  pasids_.erase_if([&](const PasidKey& key, const vtd::PasidEntry& entry) {
    if (invalidation.granularity == Granularity::kGlobal) return true;
    return entry.domain() == invalidation.domain &&
           (invalidation.granularity == Granularity::kDomain || key.pasid == invalidation.pasid);
  });
}

// A range is of addresses that go into the second stage. What a first stage has led there cannot
// be told from the tag, so all of it goes.
void VtdCaches::invalidate(const IotlbInvalidation& invalidation) {
  if (invalidation.granularity == IotlbInvalidation::Granularity::kGlobal) {
    pages_.clear();
    return;
  }
  pages_.erase_if([&](const PageKey& key, const Page&) {
    return key.tag.domain == invalidation.domain &&
           (!invalidation.range || key.tag.pasid || key.overlaps(*invalidation.range));
  });
}

void VtdCaches::invalidate(const PasidIotlbInvalidation& invalidation) {
  pages_.erase_if([&](const PageKey& key, const Page&) {
    return key.tag.domain == invalidation.domain && key.tag.pasid == invalidation.pasid &&
           (!invalidation.range || key.overlaps(*invalidation.range));
  });
}

void VtdCaches::clear() {
  contexts_.clear();
  pasids_.clear();
  pages_.clear();
}

}  // namespace mvgpu::domain
