#include "apionly-domain/faults/smmu_stalls.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "apionly-domain/base/address.h"

namespace mvgpu::domain {

namespace {

constexpr uint64_t kMostTags = uint64_t{1} << 16;

SmmuEvent EventOf(const FaultGroup& group, uint16_t tag) {
  const PageRequest& request = group.requests.front();
  SmmuEvent event;
  event.stream = group.device;
  event.substream = group.pasid;
  event.tag = tag;
  event.is_stalled = true;
  event.is_read = (request.rights & kFaultWrite) == 0;
  event.is_instruction = (request.rights & kFaultExecute) != 0;
  event.is_privileged = (request.rights & kFaultPrivileged) != 0;
  event.is_stage2 = request.stage == 2;
  event.address = request.address;
  event.stage2_address = request.stage2_address & ~kPageMask;
  return event;
}

}  // namespace

SmmuStalls::SmmuStalls(Port* port, uint64_t max_stalls)
    : port_(*port), max_stalls_(std::min(max_stalls, kMostTags)) {}

SmmuStalls::~SmmuStalls() {
  Terminate([](const FaultGroup&) { return true; });
}

// REQUIRES: not all are taken. They go round, so that a late answer does not meet the next access.
uint16_t SmmuStalls::FreeTagLocked() {
  do {
    ++last_tag_;
  } while (waiting_.contains(last_tag_));
  return last_tag_;
}

Result<void> SmmuStalls::submit(FaultGroup group, FaultSource* source) {
  if (group.requests.size() != 1) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("{} accesses of stream {:#x} at a time do not stall "
                            "as one",
                            group.requests.size(), group.device));
  }
  SmmuEvent event;
  {
    MutexLock lock(mutex_);
    if (waiting_.size() >= max_stalls_) {
      return Fail(ErrorCode::kLimit,
                  fmt::format("an access of stream {:#x} cannot stall beside {} others",
                              group.device, waiting_.size()));
    }
    const uint16_t tag = FreeTagLocked();
    event = EventOf(group, tag);
    waiting_.emplace(tag, Waiting{std::move(group), source});
  }
  auto sent = port_.on_event(event.encode());
  if (sent) return sent;
  MutexLock lock(mutex_);
  // A stream that was terminated meanwhile has had its answer.
  return waiting_.erase(event.tag) != 0 ? sent : Result<void>();
}

Result<void> SmmuStalls::command(const SmmuResume::Words& words) {
  MVGPU_ASSIGN_OR_RETURN(const SmmuResume resume, SmmuResume::Decode(words));
  if (!resume.tag) {
    Terminate([&](const FaultGroup& group) { return group.device == resume.stream; });
    return {};
  }
  const bool retries = resume.response == SmmuResume::Response::kRetry;
  return Resume(resume.stream, *resume.tag,
                retries ? FaultAnswer::kSuccess : FaultAnswer::kInvalid);
}

Result<void> SmmuStalls::Resume(uint32_t stream, uint16_t tag, FaultAnswer answer) {
  std::vector<Waiting> answered;
  {
    MutexLock lock(mutex_);
    const auto found = waiting_.find(tag);
    if (found == waiting_.end() || found->second.group.device != stream) {
      return Fail(ErrorCode::kInvalid,
                  fmt::format("no access of stream {:#x} is stalled with tag {:#x}", stream, tag));
    }
    answered.push_back(std::move(found->second));
    waiting_.erase(found);
  }
  answered.front().source->on_answer(answered.front().group, answer);
  return {};
}

template <typename IsGoing>
void SmmuStalls::Terminate(const IsGoing& is_going) {
  std::vector<Waiting> going;
  {
    MutexLock lock(mutex_);
    for (auto it = waiting_.begin(); it != waiting_.end();) {
      if (!is_going(it->second.group)) {
        ++it;
        continue;
      }
      going.push_back(std::move(it->second));
      it = waiting_.erase(it);
    }
  }
  for (const Waiting& one : going) one.source->on_answer(one.group, FaultAnswer::kInvalid);
}

uint64_t SmmuStalls::waiting() const {
  MutexLock lock(mutex_);
  return waiting_.size();
}

bool SmmuStallHandler::handle(const SmmuEvent::Words& words) {
  const auto event = SmmuEvent::Decode(words);
  if (!event || !event->is_stalled) return false;
  FaultGroup group{.device = event->stream, .pasid = event->substream, .id = event->tag};
  const FaultRights rights = (event->is_read ? kFaultRead : kFaultWrite) |
                             (event->is_instruction ? kFaultExecute : 0) |
                             (event->is_privileged ? kFaultPrivileged : 0);
  group.requests.push_back({rights, event->address, static_cast<uint8_t>(event->is_stage2 ? 2 : 1),
                            event->stage2_address});
  const FaultGroup copy = group;
  if (!sink_.submit(std::move(group), this)) on_answer(copy, FaultAnswer::kInvalid);
  return true;
}

// Nobody waits where the stream was terminated meanwhile.
void SmmuStallHandler::on_answer(const FaultGroup& group, FaultAnswer answer) {
  const auto response =
      answer == FaultAnswer::kSuccess ? SmmuResume::Response::kRetry : SmmuResume::Response::kAbort;
  static_cast<void>(
      smmu_.command(SmmuResume{group.device, static_cast<uint16_t>(group.id), response}.encode()));
}

}  // namespace mvgpu::domain
