// What a VtdIommu does when the guest says that it changed something.

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "apionly-domain/viommu/vtd_iommu.h"

namespace mvgpu::domain {

namespace {

constexpr IovaRange AllAddresses() {
  return IovaRange::FromFirstAndLast(Iova(0), Iova(~uint64_t{0}));
}

// Requests without PASID are an address space of their own.
DeviceSpace SpaceOf(SourceId source, const vtd::ContextEntry& context, Pasid pasid) {
  if (pasid == context.rid_pasid()) return {source, std::nullopt};
  return {source, pasid};
}

struct Bound {
  DeviceSpace space;
  PasidBinding binding;
};

// Copies: what is done with them changes the object's.
template <typename Matches>
std::vector<Bound> BoundWhere(const IommuObject& object, Matches matches) {
  std::vector<Bound> found;
  for (const auto& [space, binding] : object.bindings()) {
    const Bound bound{space, binding};
    if (matches(bound)) found.push_back(bound);
  }
  return found;
}

}  // namespace

void VtdIommu::add_device(SourceId source) {
  if (std::find(devices_.begin(), devices_.end(), source) != devices_.end()) return;
  devices_.push_back(source);
  SyncDevice(source);
}

void VtdIommu::on_invalidation(const InvalidationDescriptor& invalidation) {
  recent_.forget();
  std::visit([this](const auto& which) { Handle(which); }, invalidation);
}

void VtdIommu::Handle(const ContextInvalidation& invalidation) {
  caches_.invalidate(invalidation);
  using Granularity = ContextInvalidation::Granularity;
  for (const SourceId source : devices_) {
    if (invalidation.granularity != Granularity::kDevice ||
        ((source ^ invalidation.source) & invalidation.source_mask()) == 0) {
      SyncDevice(source);
    }
  }
}

void VtdIommu::Handle(const IotlbInvalidation& invalidation) {
  caches_.invalidate(invalidation);
  const bool is_global = invalidation.granularity == IotlbInvalidation::Granularity::kGlobal;
  for (const Bound& bound : BoundWhere(*parts_.object, [&](const Bound& other) {
         return is_global || other.binding.domain == invalidation.domain;
       })) {
    // With a first stage, the range is not one of the device's addresses.
    const bool is_direct = bound.binding.translation == vtd::Translation::kSecondStage ||
                           bound.binding.translation == vtd::Translation::kPassThrough;
    const IovaRange range =
        is_direct ? invalidation.range.value_or(AllAddresses()) : AllAddresses();
    parts_.object->unmap(bound.space, range);
    if (!is_direct) parts_.object->notify({bound.space, PasidIotlbEvent{range, false}});
  }
}

void VtdIommu::Handle(const PasidIotlbInvalidation& invalidation) {
  caches_.invalidate(invalidation);
  for (const Bound& bound : BoundWhere(*parts_.object, [&](const Bound& other) {
         return other.binding.domain == invalidation.domain &&
                other.binding.pasid == invalidation.pasid;
       })) {
    const IovaRange range = invalidation.range.value_or(AllAddresses());
    parts_.object->unmap(bound.space, range);
    parts_.object->notify({bound.space, PasidIotlbEvent{range, invalidation.leaf_only}});
  }
}

void VtdIommu::Handle(const DeviceTlbInvalidation& invalidation) {
  const auto tell = [&](DeviceSpace space) {
    parts_.object->notify({space, DeviceTlbUnmapEvent{invalidation.range}});
  };
  if (std::find(devices_.begin(), devices_.end(), invalidation.source) == devices_.end()) return;
  if (!invalidation.all_pasids) {
    tell({invalidation.source, invalidation.pasid});
    return;
  }
  for (const Bound& bound : BoundWhere(*parts_.object, [&](const Bound& other) {
         return other.space.source == invalidation.source && other.space.pasid;
       })) {
    tell(bound.space);
  }
}

void VtdIommu::Handle(const InterruptEntryInvalidation& invalidation) {
  parts_.owner->on_interrupt_entries_invalid(invalidation);
}

void VtdIommu::Handle(const VtdGroupResponse& response) {
  if (std::find(devices_.begin(), devices_.end(), response.requester) == devices_.end()) return;
  parts_.object->notify(
      {{response.requester, response.pasid}, PageResponseEvent{response.group, response.answer}});
  // Nobody waits where the device was reset meanwhile.
  static_cast<void>(page_requests_.respond(response.encode()));
}

void VtdIommu::Handle(const PasidCacheInvalidation& invalidation) {
  caches_.invalidate(invalidation);
  using Granularity = PasidCacheInvalidation::Granularity;
  for (const Bound& bound : BoundWhere(*parts_.object, [&](const Bound& other) {
         if (invalidation.granularity == Granularity::kGlobal) return true;
         return other.binding.domain == invalidation.domain &&
                (invalidation.granularity == Granularity::kDomain ||
                 other.binding.pasid == invalidation.pasid);
       })) {
    parts_.object->notify({bound.space, PasidCacheEvent{}});
  }
  for (const SourceId source : devices_) {
    if (invalidation.granularity == Granularity::kPasid) {
      SyncPasid(source, invalidation.pasid);
    } else {
      SyncDevice(source);
    }
  }
}

void VtdIommu::SyncAll() {
  for (const SourceId source : devices_) SyncDevice(source);
}

void VtdIommu::UnmapAll() {
  for (const SourceId source : devices_) {
    parts_.object->unmap({source, std::nullopt}, AllAddresses());
  }
  for (const Bound& bound : BoundWhere(
           *parts_.object, [](const Bound& other) { return other.space.pasid.has_value(); })) {
    parts_.object->unmap(bound.space, AllAddresses());
  }
}

void VtdIommu::sync(DeviceSpace space) {
  if (space.pasid) return SyncPasid(space.source, *space.pasid);
  const auto context = tables_.context(root_, space.source);
  if (context) SyncPasid(space.source, context->rid_pasid());
}

bool VtdIommu::Bind(DeviceSpace space, Pasid pasid, const vtd::PasidEntry& entry) {
  if (parts_.object->bind(space, PasidBinding::Of(pasid, entry))) return true;
  ++counters_.bindings_refused;
  return false;
}

void VtdIommu::SyncPasid(SourceId source, Pasid pasid) {
  DropStale(source, pasid);
  const auto context = tables_.context(root_, source);
  if (!context || pasid >= context->pasids()) return;
  const auto entry = tables_.pasid_entry(*context, pasid);
  if (entry) Bind(SpaceOf(source, *context, pasid), pasid, *entry);
}

// What is bound and not in the tables any more, or in another place of them. Of one PASID or of
// all.
void VtdIommu::DropStale(SourceId source, std::optional<Pasid> only) {
  const auto context = tables_.context(root_, source);
  for (const Bound& bound : BoundWhere(*parts_.object, [&](const Bound& other) {
         return other.space.source == source && (!only || other.binding.pasid == *only);
       })) {
    const Pasid pasid = bound.binding.pasid;
    const bool is_current = context && pasid < context->pasids() &&
                            SpaceOf(source, *context, pasid) == bound.space &&
                            tables_.pasid_entry(*context, pasid);
    if (!is_current) parts_.object->unbind(bound.space);
  }
}

void VtdIommu::SyncDevice(SourceId source) {
  DropStale(source, std::nullopt);
  const auto context = tables_.context(root_, source);
  if (!context) return;
  for (Pasid first = 0; first < context->pasids(); first += vtd::PasidDirectoryEntry::kPasids) {
    const auto table = tables_.pasid_table(*context, first);
    if (table && !BindTable(source, *context, first, *table)) return;
  }
}

// The entries of one table, read together. False when there is no room for more.
bool VtdIommu::BindTable(SourceId source, const vtd::ContextEntry& context, Pasid first,
                         uint64_t table) {
  constexpr size_t kWords = std::tuple_size_v<decltype(vtd::PasidEntry::words)>;
  std::array<uint64_t, vtd::PasidDirectoryEntry::kPasids * kWords> words;
  if (!memory_.load(table, words)) return true;  // nothing to bind there
  for (Pasid i = 0; i < vtd::PasidDirectoryEntry::kPasids; ++i) {
    vtd::PasidEntry entry;
    std::copy_n(words.begin() + i * kWords, kWords, entry.words.begin());
    if (tables_.problem(entry) != VtdReason::kNone) continue;
    if (!Bind(SpaceOf(source, context, first + i), first + i, entry)) return false;
  }
  return true;
}

}  // namespace mvgpu::domain
