#include "apionly-domain/faults/fault_router.h"

#include <utility>
#include <vector>

#include "apionly-domain/base/check.h"

namespace mvgpu::domain {

namespace {

// Faults that the guest may put right, by mapping something or allowing more. The others are wrong
// tables.
bool IsRecoverable(FaultCode code) {
  switch (code) {
    case FaultCode::kNotPresent:
    case FaultCode::kAccessFlag:
    case FaultCode::kNoRead:
    case FaultCode::kNoWrite:
    case FaultCode::kNoExecute:
    case FaultCode::kNotForUser:
      return true;
    default:
      return false;
  }
}

Wanted WantedOf(FaultRights rights) {
  return {static_cast<Rights>(rights & (kFaultRead | kFaultWrite | kFaultExecute)),
          (rights & kFaultPrivileged) != 0};
}

}  // namespace

FaultRouter::~FaultRouter() {
  MutexLock lock(mutex_);
  MVGPU_CHECK(forwarded_now_ == 0);
}

bool FaultRouter::handle_one() {
  auto taken = parts_.queue->take();
  if (!taken) return false;
  bool is_invalid = false;
  FaultGroup for_guest = taken->group;
  for_guest.requests.clear();
  for (PageRequest& request : taken->group.requests) {
    const Verdict verdict = HandleRequest(taken->group, &request);
    if (verdict == Verdict::kInvalid) is_invalid = true;
    if (verdict == Verdict::kForGuest) for_guest.requests.push_back(request);
  }
  {
    MutexLock lock(mutex_);
    ++counters_.groups;
    if (is_invalid) ++counters_.invalid;
    if (!is_invalid && for_guest.requests.empty()) ++counters_.resolved;
  }
  if (is_invalid) {
    Answer(taken->cookie, FaultAnswer::kInvalid);
  } else if (for_guest.requests.empty()) {
    Answer(taken->cookie, FaultAnswer::kSuccess);
  } else {
    Forward(taken->cookie, std::move(for_guest));
  }
  return true;
}

FaultRouter::Verdict FaultRouter::HandleRequest(const FaultGroup& group, PageRequest* request) {
  if (request->stage == 2) return InMemory(request->stage2_address, request->rights);
  const auto tables =
      parts_.spaces == nullptr ? std::nullopt : parts_.spaces->stage_one(group.device, group.pasid);
  if (!tables) return InMemory(request->address, request->rights);
  const WalkResult walked =
      tables->walker->walk(tables->root, request->address, WantedOf(request->rights));
  // Also where the hardware found nothing in stage 1 and the guest has put it right since.
  if (walked) return InMemory(walked->out, request->rights);
  if (!IsRecoverable(walked.error().code) || parts_.guest == nullptr) return Verdict::kInvalid;
  request->stage = 1;
  return Verdict::kForGuest;
}

// A fault that is to be tried again is answered like one that is resolved: the device tries again.
FaultRouter::Verdict FaultRouter::InMemory(uint64_t guest_physical, FaultRights rights) {
  const auto done = parts_.memory->fault(Iova(guest_physical), AccessOfFault(rights));
  return done ? Verdict::kDone : Verdict::kInvalid;
}

void FaultRouter::Forward(uint32_t cookie, FaultGroup group) {
  group.tag = cookie;
  {
    MutexLock lock(mutex_);
    ++forwarded_now_;
    ++counters_.forwarded;
  }
  auto sent = parts_.guest->submit(std::move(group), this);
  if (sent) return;
  {
    MutexLock lock(mutex_);
    --forwarded_now_;
    --counters_.forwarded;
    ++counters_.invalid;
  }
  Answer(cookie, FaultAnswer::kInvalid);
}

void FaultRouter::on_answer(const FaultGroup& group, FaultAnswer answer) {
  Answer(static_cast<uint32_t>(group.tag), answer);
  MutexLock lock(mutex_);
  --forwarded_now_;
}

void FaultRouter::Answer(uint32_t cookie, FaultAnswer answer) {
  if (parts_.queue->answer(cookie, answer)) return;
  MutexLock lock(mutex_);
  ++counters_.late_answers;
}

FaultRouter::Counters FaultRouter::counters() const {
  MutexLock lock(mutex_);
  return counters_;
}

}  // namespace mvgpu::domain
