#include "apionly-domain/viommu/vtd_dma_space.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>

namespace mvgpu::domain {

namespace {

std::string NameOf(DeviceSpace space) {
  if (!space.pasid) return fmt::format("device {:#x} without pasid", space.source);
  return fmt::format("pasid {:#x} of device {:#x}", *space.pasid, space.source);
}

void Append(DmaRun run, std::vector<DmaRun>* runs) {
  if (!runs->empty()) {
    DmaRun& before = runs->back();
    if (before.to + before.from.size() == run.to) {
      before.from = IovaRange::FromFirstAndLast(before.from.start(), run.from.last());
      return;
    }
  }
  runs->push_back(run);
}

}  // namespace

VtdDmaSpace::VtdDmaSpace(VtdIommu* iommu, IommuObject* object, DeviceSpace space, Owner* owner)
    : iommu_(*iommu), object_(*object), space_(space), owner_(owner) {
  IommuObject::Filter filter;
  filter.kinds = IommuEventKind::kUnmap | IommuEventKind::kDeviceTlbUnmap;
  filter.kinds |= IommuEventKind::kBindPasid | IommuEventKind::kUnbindPasid;
  filter.kinds |= IommuEventKind::kPasidIotlb | IommuEventKind::kPasidCache;
  filter.space = space_;
  object_.add(this, filter);
}

VtdDmaSpace::~VtdDmaSpace() {
  object_.remove(this);
  cancel();
}

void VtdDmaSpace::cancel() {
  if (is_waiting_) iommu_.page_requests().drop(space_.source);
  is_denied_ = false;
}

void VtdDmaSpace::on_iommu_event(const IommuEvent& event) {
  constexpr IovaRange kAll = IovaRange::FromFirstAndLast(Iova(0), Iova(~uint64_t{0}));
  IovaRange range = event.range().value_or(kAll);
  if (range == kAll) {
    largest_page_ = kPageSize;
  } else {
    // Software may name any part of a large page to mean all of it.
    const uint64_t mask = largest_page_ - 1;
    range = IovaRange::FromFirstAndLast(Iova(range.start().value() & ~mask),
                                        Iova(range.last().value() | mask));
  }
  if (user_ != nullptr) user_->on_invalidated(range);
  // Nobody answers for a PASID that is gone.
  if (is_waiting_ && event.kind() == IommuEventKind::kUnbindPasid) {
    iommu_.page_requests().drop(space_.source);
  }
}

void VtdDmaSpace::on_answer(const FaultGroup&, FaultAnswer answer) {
  is_waiting_ = false;
  is_denied_ = answer != FaultAnswer::kSuccess;
  owner_->on_pages_answered();
}

// The guest may have written the entry without telling the unit, which finds it all the same.
bool VtdDmaSpace::IsFollowed() {
  if (object_.is_bypassed() || object_.binding(space_) != nullptr) return true;
  iommu_.sync(space_);
  return object_.binding(space_) != nullptr;
}

VtdResult VtdDmaSpace::Ask(Iova at, Access access, VtdRequest::Kind kind) {
  return iommu_.translate({.source = space_.source,
                           .pasid = space_.pasid,
                           .address = at.value(),
                           .wanted = access,
                           .kind = kind});
}

// A fault that was kept from the log, since the device could have asked for the page, is logged as
// that of the access itself.
Error VtdDmaSpace::Refuse(Iova at, Access access, VtdFault fault) {
  if (owner_ != nullptr && fault.is_recoverable()) {
    is_denied_ = false;
    if (const auto target = Ask(at, access, VtdRequest::Kind::kUntranslated); !target) {
      fault = target.error();
    }
  }
  return {ErrorCode::kNotMapped, fmt::format("{}: fault {}; map it in the guest's tables",
                                             NameOf(space_), fault.ToString())};
}

bool VtdDmaSpace::MayAsk(const VtdFault& fault) const {
  return owner_ != nullptr && fault.is_recoverable() && !is_denied_;
}

Error VtdDmaSpace::AskFor(std::vector<PageRequest> pages, Access access, VtdFault first) {
  if (!is_waiting_) {
    const Iova at(pages.front().address);
    FaultGroup group{.device = space_.source, .pasid = space_.pasid, .id = next_group_};
    group.requests = std::move(pages);
    next_group_ = (next_group_ + 1) % 512;
    is_waiting_ = true;
    if (!iommu_.submit(std::move(group), this)) {
      is_waiting_ = false;
      return Refuse(at, access, first);
    }
  }
  return {ErrorCode::kPending, fmt::format("{}: the guest was asked for pages", NameOf(space_))};
}

Result<std::vector<DmaRun>> VtdDmaSpace::translate(IovaRange range, Access access) {
  if (object_.is_bypassed() && !space_.pasid) return std::vector{DmaRun{range, range.start()}};
  const bool is_followed = IsFollowed();
  const auto kind =
      owner_ != nullptr ? VtdRequest::Kind::kTranslation : VtdRequest::Kind::kUntranslated;
  std::vector<DmaRun> runs;
  std::vector<PageRequest> missing;
  std::optional<VtdFault> first;
  for (Iova at = range.start();;) {
    const auto target = Ask(at, access, kind);
    if (!target && !MayAsk(target.error())) {
      return tl::unexpected<Error>(Refuse(at, access, target.error()));
    }
    if (target && !is_followed) {
      return Fail(ErrorCode::kLimit,
                  fmt::format("{}: no room for another binding; unbind PASIDs of devices behind "
                              "this iommu",
                              NameOf(space_)));
    }
    const uint64_t left = range.last() - at;  // and one
    uint64_t more = std::min(kPageMask - (at.value() & kPageMask), left);
    if (target) {
      largest_page_ = std::max(largest_page_, target->page_size);
      more = std::min(target->length - 1, left);
      Append({IovaRange::FromFirstAndLast(at, at + more), Iova(target->address)}, &runs);
    } else {
      if (!first) first = target.error();
      missing.push_back({.rights = RightsOf(access), .address = at.value()});
    }
    if (more == left || missing.size() == kMostRequests) break;
    at = at + more + 1;
  }
  if (missing.empty()) return runs;
  return tl::unexpected<Error>(AskFor(std::move(missing), access, *first));
}

}  // namespace mvgpu::domain
