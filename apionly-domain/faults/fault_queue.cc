#include "apionly-domain/faults/fault_queue.h"

#include <fmt/format.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <iterator>

#include "apionly-domain/base/check.h"

namespace mvgpu::domain {

namespace {

Result<void> CheckRecordSize(size_t bytes, size_t record, std::string_view what) {
  if (bytes % record == 0) return {};
  return FailSystem(ESPIPE,
                    fmt::format("{} bytes are not whole {} of {} bytes", bytes, what, record));
}

void CopyRecords(const FaultGroup& group, uint32_t cookie, std::span<std::byte> to) {
  for (size_t i = 0; i < group.requests.size(); ++i) {
    const PageRequest& request = group.requests[i];
    HwptPageFault record;
    if (group.pasid) record.flags |= HwptPageFault::kPasidValid;
    if (i + 1 == group.requests.size()) record.flags |= HwptPageFault::kLastPage;
    record.device = group.device;
    record.pasid = group.pasid.value_or(0);
    record.group = group.id;
    record.rights = request.rights;
    record.address = request.address;
    record.cookie = cookie;
    std::memcpy(to.subspan(i * sizeof(record)).data(), &record, sizeof(record));
  }
}

}  // namespace

Result<std::unique_ptr<FaultQueue>> FaultQueue::Create(Options options, FaultTimes* times) {
  UniqueFd event(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!event.is_valid()) return FailSystem(errno, "eventfd of a fault queue");
  return std::unique_ptr<FaultQueue>(new FaultQueue(options, std::move(event), times));
}

Result<void> FaultQueue::submit(FaultGroup group, FaultSource* source) {
  if (group.requests.empty()) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("group {} of device {:#x} asks for no page", group.id, group.device));
  }
  const auto now = FaultClock::now();
  const auto took = now - group.raised_at;
  MutexLock lock(mutex_);
  if (is_closed_) return Fail(ErrorCode::kRevoked, "the fault queue is closed");
  if (group.requests.size() > options_.max_requests - requests_) {
    ++counters_.refused;
    return Fail(
        ErrorCode::kLimit,
        fmt::format("{} page requests of device {:#x} beside {} that are not answered are more "
                    "than the {} of a fault queue",
                    group.requests.size(), group.device, requests_, options_.max_requests));
  }
  requests_ += group.requests.size();
  ++counters_.accepted;
  waiting_.push_back({std::move(group), source, now});
  UpdateEventLocked();
  if (times_ != nullptr) times_->add(FaultStep::kReport, took);
  return {};
}

uint32_t FaultQueue::TakeFirstLocked() {
  // No two groups that are taken have the same one, also after 2^32 of them; 0 is none.
  do {
    ++last_cookie_;
  } while (last_cookie_ == 0 || taken_.contains(last_cookie_));
  if (times_ != nullptr) {
    times_->add(FaultStep::kQueue, FaultClock::now() - waiting_.front().queued_at);
  }
  taken_.emplace(last_cookie_, std::move(waiting_.front()));
  waiting_.pop_front();
  UpdateEventLocked();
  return last_cookie_;
}

Result<size_t> FaultQueue::read(std::span<std::byte> records) {
  MVGPU_RETURN_IF_ERROR(CheckRecordSize(records.size(), sizeof(HwptPageFault), "page faults"));
  size_t done = 0;
  MutexLock lock(mutex_);
  while (!waiting_.empty()) {
    const size_t size = waiting_.front().group.requests.size() * sizeof(HwptPageFault);
    if (size > records.size() - done) break;
    const uint32_t cookie = TakeFirstLocked();
    CopyRecords(taken_.at(cookie).group, cookie, records.subspan(done, size));
    done += size;
  }
  return done;
}

Result<size_t> FaultQueue::write(std::span<const std::byte> responses) {
  MVGPU_RETURN_IF_ERROR(CheckRecordSize(responses.size(), sizeof(HwptPageResponse), "responses"));
  size_t done = 0;
  while (done < responses.size()) {
    HwptPageResponse response;
    std::memcpy(&response, responses.subspan(done).data(), sizeof(response));
    Result<void> answered = {};
    if (response.code > static_cast<uint32_t>(FaultAnswer::kInvalid)) {
      answered = Fail(ErrorCode::kInvalid, fmt::format("code {} of a page response is neither 0 "
                                                       "(success) nor 1 (invalid)",
                                                       response.code));
    } else {
      answered = answer(response.cookie, static_cast<FaultAnswer>(response.code));
    }
    if (!answered && done == 0) return tl::unexpected<Error>(std::move(answered).error());
    if (!answered) break;
    done += sizeof(response);
  }
  return done;
}

std::optional<FaultQueue::Taken> FaultQueue::take() {
  MutexLock lock(mutex_);
  if (waiting_.empty()) return std::nullopt;
  const uint32_t cookie = TakeFirstLocked();
  return Taken{cookie, taken_.at(cookie).group};
}

Result<void> FaultQueue::answer(uint32_t cookie, FaultAnswer answer) {
  std::optional<Entry> entry;
  {
    MutexLock lock(mutex_);
    const auto found = taken_.find(cookie);
    if (found == taken_.end()) {
      return Fail(ErrorCode::kInvalid,
                  fmt::format("no fault group waits for an answer with cookie {}", cookie));
    }
    entry = std::move(found->second);
    taken_.erase(found);
    requests_ -= entry->group.requests.size();
    ++counters_.answered;
  }
  Tell(*entry, answer);
  return {};
}

void FaultQueue::Tell(const Entry& entry, FaultAnswer answer) {
  const auto start = FaultClock::now();
  entry.source->on_answer(entry.group, answer);
  if (times_ != nullptr) times_->add(FaultStep::kResume, FaultClock::now() - start);
}

template <typename IsGoing>
FaultQueue::Entries FaultQueue::RemoveLocked(const IsGoing& is_going) {
  Entries going;
  for (auto it = taken_.begin(); it != taken_.end();) {
    if (!is_going(it->second.group)) {
      ++it;
      continue;
    }
    going.push_back(std::move(it->second));
    it = taken_.erase(it);
  }
  const auto first = std::stable_partition(
      waiting_.begin(), waiting_.end(), [&](const Entry& entry) { return !is_going(entry.group); });
  std::move(first, waiting_.end(), std::back_inserter(going));
  waiting_.erase(first, waiting_.end());
  for (const Entry& entry : going) requests_ -= entry.group.requests.size();
  counters_.auto_answered += going.size();
  UpdateEventLocked();
  return going;
}

size_t FaultQueue::AutoAnswer(Entries going) {
  for (const Entry& entry : going) Tell(entry, FaultAnswer::kInvalid);
  return going.size();
}

size_t FaultQueue::detach(uint32_t device, std::optional<uint32_t> pasid) {
  Entries going;
  {
    MutexLock lock(mutex_);
    going = RemoveLocked([&](const FaultGroup& group) {
      return group.device == device && (!pasid || group.pasid == pasid);
    });
  }
  return AutoAnswer(std::move(going));
}

void FaultQueue::close() {
  Entries going;
  {
    MutexLock lock(mutex_);
    is_closed_ = true;
    going = RemoveLocked([](const FaultGroup&) { return true; });
  }
  AutoAnswer(std::move(going));
}

// The descriptor is set while something waits.
void FaultQueue::UpdateEventLocked() {
  if (waiting_.empty() != event_is_set_) return;
  uint64_t value = 1;
  const ssize_t done = event_is_set_ ? ::read(event_.get(), &value, sizeof(value))
                                     : ::write(event_.get(), &value, sizeof(value));
  MVGPU_CHECK(done == sizeof(value));  // between 0 and 1 an eventfd does not refuse
  event_is_set_ = !event_is_set_;
}

FaultQueue::Counters FaultQueue::counters() const {
  MutexLock lock(mutex_);
  Counters counters = counters_;
  counters.waiting = waiting_.size();
  counters.taken = taken_.size();
  return counters;
}

}  // namespace mvgpu::domain
