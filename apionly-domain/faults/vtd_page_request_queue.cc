// The IOMMU's end.

#include <fmt/format.h>

#include "apionly-domain/faults/vtd_page_requests.h"

namespace mvgpu::domain {

namespace {

constexpr uint64_t kMostPasids = uint64_t{1} << 20;
constexpr uint64_t kMostGroups = 512;

Result<void> CheckNumbers(const FaultGroup& group) {
  if (!group.requests.empty() && group.device <= UINT16_MAX && group.id < kMostGroups &&
      group.pasid.value_or(0) < kMostPasids) {
    return {};
  }
  return Fail(ErrorCode::kInvalid,
              fmt::format("group {} with {} requests of device {:#x}, pasid {:#x}, does not fit "
                          "entries of vt-d: 9, 16 and 20 bits",
                          group.id, group.requests.size(), group.device, group.pasid.value_or(0)));
}

}  // namespace

void VtdPageRequestQueue::set_address(uint64_t address) {
  MutexLock lock(mutex_);
  address_ = address & (~kPageMask | 7);
  head_ = tail_ = 0;
}

uint64_t VtdPageRequestQueue::address() const {
  MutexLock lock(mutex_);
  return address_;
}

uint64_t VtdPageRequestQueue::head() const {
  MutexLock lock(mutex_);
  return head_;
}

uint64_t VtdPageRequestQueue::tail() const {
  MutexLock lock(mutex_);
  return tail_;
}

void VtdPageRequestQueue::set_head(uint64_t head) {
  MutexLock lock(mutex_);
  head_ = head & (RingBytesLocked() - 1) & ~(VtdPageRequest::kBytes - 1);
}

uint32_t VtdPageRequestQueue::status() const {
  MutexLock lock(mutex_);
  return status_;
}

void VtdPageRequestQueue::clear_status(uint32_t bits) {
  MutexLock lock(mutex_);
  status_ &= ~bits;
}

void VtdPageRequestQueue::SetStatusLocked(uint32_t bit, bool* interrupts) {
  if ((status_ & bit) == 0) *interrupts = true;
  status_ |= bit;
}

Result<void> VtdPageRequestQueue::WriteEntryLocked(const VtdPageRequest& request,
                                                   bool* interrupts) {
  const uint64_t next = (tail_ + VtdPageRequest::kBytes) & (RingBytesLocked() - 1);
  if ((status_ & kOverflow) != 0 || next == head_) {
    SetStatusLocked(kOverflow, interrupts);
    ++counters_.dropped;
    return Fail(ErrorCode::kLimit,
                fmt::format("the page request queue at {:#x} is full, of {} entries", address_,
                            RingBytesLocked() / VtdPageRequest::kBytes));
  }
  const VtdPageRequest::Words words = request.encode();
  const Iova ring(address_ & ~kPageMask);
  MVGPU_RETURN_IF_ERROR(memory_.publish(ring + tail_, std::as_bytes(std::span(words))));
  tail_ = next;
  ++counters_.entries;
  SetStatusLocked(kPending, interrupts);
  return {};
}

Result<void> VtdPageRequestQueue::WriteEntriesLocked(const FaultGroup& group, bool* interrupts) {
  for (size_t i = 0; i < group.requests.size(); ++i) {
    const PageRequest& page = group.requests[i];
    VtdPageRequest entry;
    entry.requester = static_cast<uint16_t>(group.device);
    entry.pasid = group.pasid;
    entry.group = static_cast<uint16_t>(group.id);
    entry.executes = (page.rights & kFaultExecute) != 0;
    entry.reads = (page.rights & kFaultRead) != 0;
    entry.writes = (page.rights & kFaultWrite) != 0;
    entry.is_privileged = (page.rights & kFaultPrivileged) != 0;
    entry.is_last = i + 1 == group.requests.size();
    entry.address = page.address & ~kPageMask;
    MVGPU_RETURN_IF_ERROR(WriteEntryLocked(entry, interrupts));
  }
  return {};
}

Result<void> VtdPageRequestQueue::submit(FaultGroup group, FaultSource* source) {
  MVGPU_RETURN_IF_ERROR(CheckNumbers(group));
  const Key key(static_cast<uint16_t>(group.device), group.pasid, static_cast<uint16_t>(group.id));
  bool interrupts = false;
  Result<void> written = {};
  {
    MutexLock lock(mutex_);
    if (waiting_.contains(key)) {
      return Fail(ErrorCode::kBusy,
                  fmt::format("group {} of device {:#x} waits for its answer already", group.id,
                              group.device));
    }
    written = WriteEntriesLocked(group, &interrupts);
    if (written) waiting_.emplace(key, Waiting{std::move(group), source});
  }
  if (interrupts && owner_ != nullptr) owner_->on_page_request_event();
  return written;
}

Result<void> VtdPageRequestQueue::respond(const VtdGroupResponse::Words& words) {
  MVGPU_ASSIGN_OR_RETURN(const VtdGroupResponse response, VtdGroupResponse::Decode(words));
  std::optional<Waiting> answered;
  {
    MutexLock lock(mutex_);
    const auto found = waiting_.find(Key(response.requester, response.pasid, response.group));
    if (found == waiting_.end()) {
      return Fail(ErrorCode::kInvalid,
                  fmt::format("no group {} of device {:#x} waits for an answer", response.group,
                              response.requester));
    }
    answered = std::move(found->second);
    waiting_.erase(found);
  }
  answered->source->on_answer(answered->group, response.answer);
  return {};
}

size_t VtdPageRequestQueue::Drop(const std::function<bool(const Key&)>& is_going) {
  std::vector<Waiting> going;
  {
    MutexLock lock(mutex_);
    for (auto it = waiting_.begin(); it != waiting_.end();) {
      if (!is_going(it->first)) {
        ++it;
        continue;
      }
      going.push_back(std::move(it->second));
      it = waiting_.erase(it);
    }
  }
  for (const Waiting& group : going) group.source->on_answer(group.group, FaultAnswer::kInvalid);
  return going.size();
}

size_t VtdPageRequestQueue::drop(uint16_t requester) {
  return Drop([requester](const Key& key) { return std::get<0>(key) == requester; });
}

size_t VtdPageRequestQueue::drop_all() {
  return Drop([](const Key&) { return true; });
}

VtdPageRequestQueue::Counters VtdPageRequestQueue::counters() const {
  MutexLock lock(mutex_);
  Counters counters = counters_;
  counters.waiting = waiting_.size();
  return counters;
}

}  // namespace mvgpu::domain
