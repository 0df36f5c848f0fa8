// The driver's end, as Linux does it (drivers/iommu/intel/prq.c).

#include <algorithm>
#include <utility>

#include "apionly-domain/faults/vtd_page_requests.h"

namespace mvgpu::domain {

namespace {

// In the sense of 57 bits: five levels.
bool IsCanonical(uint64_t address) {
  const auto sign = static_cast<int64_t>(address) >> 56;
  return sign == 0 || sign == -1;
}

FaultRights RightsOf(const VtdPageRequest& request) {
  return (request.reads ? kFaultRead : 0) | (request.writes ? kFaultWrite : 0) |
         (request.executes ? kFaultExecute : 0) | (request.is_privileged ? kFaultPrivileged : 0);
}

VtdGroupResponse ResponseTo(const VtdPageRequest& request, FaultAnswer answer) {
  return {request.requester, request.pasid, request.group, request.is_last, answer};
}

}  // namespace

Result<void> VtdPageRequestHandler::poll() {
  // First: what comes from here on sets it again.
  iommu_.clear_status(VtdPageRequestQueue::kPending);
  const uint64_t tail = iommu_.tail();
  const uint64_t ring_bytes = kPageSize << (iommu_.address() & 7);
  std::vector<FaultGroup> complete;
  std::vector<VtdGroupResponse> refused;
  Result<void> read = {};
  {
    MutexLock lock(mutex_);
    uint64_t entries_left = ring_bytes / VtdPageRequest::kBytes;
    for (uint64_t at = iommu_.head(); at != tail && entries_left > 0; --entries_left) {
      auto words = ReadEntry(at);
      if (!words) {
        read = tl::unexpected<Error>(std::move(words).error());
        break;
      }
      ++counters_.entries;
      HandleEntryLocked(*words);
      at = (at + VtdPageRequest::kBytes) & (ring_bytes - 1);
      iommu_.set_head(at);
    }
    ClearOverflowLocked();
    complete.swap(complete_);
    refused.swap(refused_);
  }
  for (const VtdGroupResponse& response : refused) Answer(response);
  for (FaultGroup& group : complete) {
    const FaultGroup copy = group;
    if (!sink_.submit(std::move(group), this)) on_answer(copy, FaultAnswer::kInvalid);
  }
  return read;
}

Result<VtdPageRequest::Words> VtdPageRequestHandler::ReadEntry(uint64_t offset) const {
  VtdPageRequest::Words words{};
  const Iova ring(iommu_.address() & ~kPageMask);
  MVGPU_RETURN_IF_ERROR(memory_.read(ring + offset, std::as_writable_bytes(std::span(words))));
  return words;
}

bool VtdPageRequestHandler::IsBad(const VtdPageRequest& request) const {
  return !IsCanonical(request.address) ||
         (request.is_privileged && (request.reads || request.writes)) ||
         (request.executes && request.reads);
}

void VtdPageRequestHandler::HandleEntryLocked(const VtdPageRequest::Words& words) {
  const auto request = VtdPageRequest::Decode(words);
  if (!request) {
    ++counters_.bad;
    return;
  }
  if (IsBad(*request)) {
    ++counters_.bad;
    if (request->is_last) refused_.push_back(ResponseTo(*request, FaultAnswer::kInvalid));
    return;
  }
  if (request->is_stop_marker()) {
    ++counters_.stop_markers;
    return;
  }
  if (!options_.knows(request->requester)) {
    ++counters_.bad;
    if (request->is_last) refused_.push_back(ResponseTo(*request, FaultAnswer::kInvalid));
    return;
  }
  if (request->is_last) return CompleteLocked(*request);
  KeepLocked(*request);
}

void VtdPageRequestHandler::KeepLocked(const VtdPageRequest& request) {
  if (partial_requests_ >= options_.max_partial_requests) {
    ++counters_.discarded;
    return;
  }
  partial_[Key(request.requester, request.group)].push_back({RightsOf(request), request.address});
  ++partial_requests_;
}

void VtdPageRequestHandler::CompleteLocked(const VtdPageRequest& last) {
  FaultGroup group{.device = last.requester, .pasid = last.pasid, .id = last.group};
  if (const auto found = partial_.find(Key(last.requester, last.group)); found != partial_.end()) {
    group.requests = std::move(found->second);
    partial_requests_ -= group.requests.size();
    partial_.erase(found);
  }
  group.requests.push_back({RightsOf(last), last.address});
  ++counters_.groups;
  complete_.push_back(std::move(group));
}

// Last requests may have been dropped: what waits for one would wait for ever.
void VtdPageRequestHandler::ClearOverflowLocked() {
  if ((iommu_.status() & VtdPageRequestQueue::kOverflow) == 0) return;
  if (iommu_.head() != iommu_.tail()) return;
  counters_.discarded += partial_requests_;
  partial_.clear();
  partial_requests_ = 0;
  ++counters_.overflows;
  iommu_.clear_status(VtdPageRequestQueue::kOverflow);
}

void VtdPageRequestHandler::on_answer(const FaultGroup& group, FaultAnswer answer) {
  Answer({static_cast<uint16_t>(group.device), group.pasid, static_cast<uint16_t>(group.id),
          /*is_last=*/true, answer});
}

// Nobody waits where the device was reset meanwhile.
void VtdPageRequestHandler::Answer(const VtdGroupResponse& response) {
  static_cast<void>(iommu_.respond(response.encode()));
}

VtdPageRequestHandler::Counters VtdPageRequestHandler::counters() const {
  MutexLock lock(mutex_);
  return counters_;
}

}  // namespace mvgpu::domain
