#include "apionly-domain/viommu/vtd_iommu.h"

#include <fmt/format.h>

#include <span>
#include <utility>

#include "apionly-domain/api_only_domain.h"

namespace mvgpu::domain {

namespace {

tl::unexpected<VtdFault> At(uint64_t address, VtdFault fault) {
  fault.address = address;
  return tl::unexpected(fault);
}

}  // namespace

VtdIommu::VtdIommu(Options options, Parts parts)
    : parts_(parts),
      memory_(parts.guest),
      tables_(options.abilities, &memory_),
      translator_(&tables_),
      caches_(options.caches),
      recent_(options.caches.pages),
      faults_(options.fault_records, this),
      queue_(options.rules, &memory_, this),
      page_requests_(parts.guest, this) {}

void VtdIommu::set_root(uint64_t rtaddr) {
  root_.raw = rtaddr;
  caches_.clear();
  recent_.forget();
  UnmapAll();
  SyncAll();
}

void VtdIommu::set_translating(bool translating) {
  if (is_translating_ == translating) return;
  is_translating_ = translating;
  recent_.forget();
  parts_.object->set_bypassed(!translating);
  UnmapAll();
}

void VtdIommu::write_fault_status(uint32_t fsts) {
  faults_.clear(fsts);
  if ((fsts & FaultLog::kQueueError) != 0) queue_.clear_error();
}

bool VtdIommu::write_status(uint64_t address, uint32_t status) {
  return parts_.guest->publish(Iova(address), std::as_bytes(std::span(&status, 1))).has_value();
}

void VtdIommu::on_wait_complete() {
  if (is_wait_complete_) return;
  is_wait_complete_ = true;
  if (wait_event_.raise()) parts_.owner->on_wait_event();
}

void VtdIommu::clear_wait_complete() {
  is_wait_complete_ = false;
  wait_event_.drop();
}

void VtdIommu::set_wait_masked(bool masked) {
  if (wait_event_.set_masked(masked)) parts_.owner->on_wait_event();
}

void VtdIommu::on_queue_error(QueueError) { faults_.raise(FaultLog::kQueueError); }

VtdResult VtdIommu::TranslateAnew(const VtdRequest& request) {
  if (!is_translating_) return Bypass(request);
  const VtdResult result = Translate(request);
  if (!result) Record(request, result.error());
  return result;
}

VtdResult VtdIommu::Bypass(const VtdRequest& request) const {
  if (request.pasid) return At(request.address, {.is_hidden = true});
  return VtdTarget{request.address, kPageSize - (request.address & kPageMask),
                   kMayRead | kMayWrite | kMayExecute};
}

VtdTables::ContextResult VtdIommu::ContextOf(SourceId source) {
  if (const auto* known = caches_.context(source)) return *known;
  const auto context = tables_.context(root_, source);
  if (context) caches_.remember(source, *context);
  return context;
}

tl::expected<VtdIommu::Found, VtdFault> VtdIommu::Find(const VtdRequest& request) {
  const auto context = ContextOf(request.source);
  if (!context) return tl::unexpected(context.error());
  const auto pasid = tables_.pasid_of(*context, request);
  if (!pasid) return tl::unexpected(pasid.error());
  if (const auto* known = caches_.pasid(request.source, *pasid)) {
    return Found{*context, *pasid, *known};
  }
  const auto entry = tables_.pasid_entry(*context, *pasid);
  if (!entry) return tl::unexpected(entry.error());
  caches_.remember(request.source, *pasid, *entry);
  return Found{*context, *pasid, *entry};
}

VtdResult VtdIommu::Translate(const VtdRequest& request) {
  const auto found = Find(request);
  if (!found) return At(request.address, found.error());
  if (const auto admitted = tables_.admit(found->entry, request); !admitted) {
    return At(request.address, admitted.error());
  }
  const Wanted wanted(request.wanted.rights, IsPrivileged(found->context, request));
  const auto tag = VtdCaches::TagOf(found->entry, found->pasid, wanted.privileged);
  // To want nothing leaves no marks, and no traces here.
  const bool is_cached =
      wanted.rights != 0 && found->entry.translation() != vtd::Translation::kPassThrough;
  if (is_cached) {
    if (const auto leaf = caches_.page(tag, request.address, wanted.rights)) {
      ++counters_.page_hits;
      recent_.remember(request, *leaf);
      return VtdTranslator::TargetOf(*leaf);
    }
  }
  ++counters_.walks;
  const auto leaf = translator_.walk(found->entry, request.address, wanted);
  if (!leaf) return At(request.address, leaf.error());
  if (is_cached) {
    caches_.remember(tag, request.address, *leaf);
    recent_.remember(request, *leaf);
  }
  return VtdTranslator::TargetOf(*leaf);
}

void VtdIommu::Record(const VtdRequest& request, const VtdFault& fault) {
  ++counters_.faults;
  const bool is_request = request.kind == VtdRequest::Kind::kTranslation;
  if (fault.is_hidden || (is_request && fault.is_recoverable())) return;
  faults_.record({.source = request.source,
                  .pasid = request.pasid,
                  .address = request.address,
                  .reason = fault.reason,
                  .wanted = request.wanted,
                  .is_translation_request = is_request});
}

void VtdIommu::ForgetPage(const Found& found, Iova page) {
  recent_.forget();
  const IovaRange range = RangeOf({page.page(), 1});
  if (found.entry.has_first_stage()) {
    caches_.invalidate(PasidIotlbInvalidation{
        .domain = found.entry.domain(), .pasid = found.pasid, .range = range});
  } else {
    caches_.invalidate(IotlbInvalidation{.granularity = IotlbInvalidation::Granularity::kPages,
                                         .domain = found.entry.domain(),
                                         .range = range});
  }
}

tl::expected<void, VtdFault> VtdIommu::AdmitPage(DeviceSpace space, const PageRequest& page) {
  constexpr FaultRights kRights = kMayRead | kMayWrite | kMayExecute;  // as in FaultRights
  const VtdRequest asked{
      .source = space.source,
      .pasid = space.pasid,
      .address = page.address,
      .wanted = {static_cast<Rights>(page.rights & kRights), (page.rights & kFaultPrivileged) != 0},
      .kind = VtdRequest::Kind::kPage};
  const auto found = Find(asked);
  if (found) {
    ForgetPage(*found, Iova(page.address & ~kPageMask));
    return {};
  }
  Record(asked, found.error());
  return At(asked.address, found.error());
}

void VtdIommu::TellRequests(DeviceSpace space, const FaultGroup& group) {
  for (size_t i = 0; i < group.requests.size(); ++i) {
    const PageRequest& page = group.requests[i];
    parts_.object->notify(
        {space, PageRequestEvent{Iova(page.address & ~kPageMask), AccessOfFault(page.rights),
                                 static_cast<uint16_t>(group.id), i + 1 == group.requests.size()}});
  }
}

Result<void> VtdIommu::submit(FaultGroup group, FaultSource* source) {
  if (group.device > UINT16_MAX || group.pasid.value_or(0) > vtd::kPasidMask ||
      group.id > UINT16_MAX) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("group {:#x} of device {:#x}, pasid {:#x}, is none of vt-d: 16 bits "
                            "for the device, 20 for the pasid",
                            group.id, group.device, group.pasid.value_or(0)));
  }
  const DeviceSpace space{static_cast<SourceId>(group.device), group.pasid};
  for (const PageRequest& page : group.requests) {
    if (const auto admitted = AdmitPage(space, page); !admitted) {
      return Fail(ErrorCode::kInvalid,
                  fmt::format("page request: fault {}", admitted.error().ToString()));
    }
  }
  // First: the guest may answer before the queue returns.
  TellRequests(space, group);
  const auto id = static_cast<uint16_t>(group.id);
  auto queued = page_requests_.submit(std::move(group), source);
  if (!queued) parts_.object->notify({space, PageResponseEvent{id, FaultAnswer::kInvalid}});
  return queued;
}

}  // namespace mvgpu::domain
