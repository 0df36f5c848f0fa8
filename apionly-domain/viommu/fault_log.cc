#include "apionly-domain/viommu/fault_log.h"

#include <algorithm>

#include "apionly-domain/base/check.h"

namespace mvgpu::domain {

namespace {

constexpr size_t kMostRecords = 256;
constexpr unsigned kPrivileged = 29;
constexpr unsigned kExecute = 30;
constexpr unsigned kPasidPresent = 31;
constexpr unsigned kReason = 32;
constexpr unsigned kPasid = 40;
constexpr unsigned kAddressType = 60;
constexpr unsigned kRead = 62;
// Who sent it: source, PP, PASID.
constexpr uint64_t kSender =
    0xffff | uint64_t{1} << kPasidPresent | uint64_t{vtd::kPasidMask} << kPasid;

// Privilege and execution are attributes of requests with PASID.
FaultLog::Words WordsOf(const FaultRecord& fault) {
  const bool is_write = (fault.wanted.rights & kMayWrite) != 0;
  uint64_t high = FaultLog::kUsed | fault.source | uint64_t{fault.reason} << kReason;
  if (!is_write) high |= uint64_t{1} << kRead;
  if (fault.is_translation_request) high |= uint64_t{1} << kAddressType;
  if (fault.pasid) {
    high |= uint64_t{1} << kPasidPresent | uint64_t{*fault.pasid & vtd::kPasidMask} << kPasid;
    if (fault.wanted.privileged) high |= uint64_t{1} << kPrivileged;
    if ((fault.wanted.rights & kMayExecute) != 0) high |= uint64_t{1} << kExecute;
  }
  return {fault.address & ~kPageMask, high};
}

}  // namespace

FaultLog::FaultLog(size_t records, Owner* owner) : owner_(*owner), records_(records) {
  MVGPU_CHECK(records >= 1 && records <= kMostRecords);
}

bool FaultLog::IsKnown(const Words& words) const {
  return std::any_of(records_.begin(), records_.end(), [&](const Words& other) {
    return (other.high & kUsed) != 0 && other.low == words.low &&
           ((other.high ^ words.high) & kSender) == 0;
  });
}

void FaultLog::record(const FaultRecord& fault) {
  if ((status_ & kOverflow) != 0) {
    ++lost_;
    return;
  }
  const Words words = WordsOf(fault);
  if (IsKnown(words)) {
    ++collapsed_;
    return;
  }
  if ((records_[next_].high & kUsed) != 0) {
    ++lost_;
    Set(kOverflow);
    return;
  }
  records_[next_] = words;
  if ((status_ & kPending) == 0) first_ = next_;
  next_ = (next_ + 1) % records_.size();
  Set(kPending);
}

void FaultLog::raise(Status status) { Set(status); }

uint32_t FaultLog::status() const {
  const uint32_t first = (status_ & kPending) != 0 ? static_cast<uint32_t>(first_) << 8 : 0;
  return status_ | first;
}

void FaultLog::Set(Status status) {
  const bool was_idle = status_ == 0;
  status_ |= status;
  if (was_idle && event_.raise()) owner_.on_fault_event();
}

void FaultLog::DropEventIfIdle() {
  if (status_ == 0) event_.drop();
}

void FaultLog::clear(uint32_t status) {
  status_ &= ~(status & (kOverflow | kQueueError | kCompletionError | kTimeout));
  DropEventIfIdle();
}

void FaultLog::release(size_t index) {
  if (index >= records_.size()) return;
  records_[index] = {};
  const bool any = std::any_of(records_.begin(), records_.end(),
                               [](const Words& words) { return (words.high & kUsed) != 0; });
  if (!any) status_ &= ~uint32_t{kPending};
  DropEventIfIdle();
}

void FaultLog::set_masked(bool masked) {
  if (event_.set_masked(masked)) owner_.on_fault_event();
}

}  // namespace mvgpu::domain
