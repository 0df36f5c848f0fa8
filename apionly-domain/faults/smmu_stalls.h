#pragma once

// Both ends of SMMUv3's stall model: an access that finds no translation waits in the SMMU, an
// event says so, and a command lets it go on.
//
//   SmmuStalls         the SMMU's end: keeps the accesses, gives each a tag, makes the event, and
//                      answers the device when CMD_RESUME or CMD_STALL_TERM comes
//   SmmuStallHandler   the driver's end: turns events into faults, and answers into commands
//
// Which accesses stall is the tables' business (CD.S, STE.S2S, STE.S1STALLD).

#include <cstdint>

#include <absl/container/btree_map.h>

#include "apionly-domain/base/error.h"
#include "apionly-domain/base/mutex.h"
#include "apionly-domain/faults/page_request.h"
#include "apionly-domain/faults/smmu_records.h"

namespace mvgpu::domain {

// Thread-safe. Sources and the port are called without its lock.
class SmmuStalls final : public FaultSink {
 public:
  // The event queue.
  class Port {
   public:
    virtual ~Port() = default;
    // Error: kLimit, no room; the access is refused then.
    virtual Result<void> on_event(const SmmuEvent::Words& words) = 0;
  };

  // At most `max_stalls` accesses wait at a time, up to 65536. `port` outlives this.
  explicit SmmuStalls(Port* port, uint64_t max_stalls = 256);
  // Terminates what waits.
  ~SmmuStalls() override;

  // A group is one access here, its device the stream and its pasid the substream. Errors: also
  // kInvalid (several requests), those of the port.
  Result<void> submit(FaultGroup group, FaultSource* source) override;
  // Retry answers kSuccess, abort and terminate kInvalid. Error: kInvalid (no such command, or no
  // such access of this stream; hardware ignores it). All of a stream are none, maybe.
  Result<void> command(const SmmuResume::Words& words);
  uint64_t waiting() const;

 private:
  struct Waiting {
    FaultGroup group;
    FaultSource* source;  // outlives the answer: contract of submit()
  };

  uint16_t FreeTagLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  Result<void> Resume(uint32_t stream, uint16_t tag, FaultAnswer answer);
  template <typename IsGoing>
  void Terminate(const IsGoing& is_going);

  Port& port_;  // outlives this
  const uint64_t max_stalls_;
  mutable ExclusiveMutex mutex_;
  absl::btree_map<uint16_t, Waiting> waiting_ ABSL_GUARDED_BY(mutex_);  // by tag
  uint16_t last_tag_ ABSL_GUARDED_BY(mutex_) = 0;
};

// Thread-safe.
class SmmuStallHandler final : public FaultSource {
 public:
  // Both outlive the handler, which outlives the answers to what it submitted.
  SmmuStallHandler(SmmuStalls* smmu, FaultSink* sink) : smmu_(*smmu), sink_(*sink) {}

  // A record of the event queue. False when it is nobody's who waits: of another type, or not
  // stalled. What the sink refuses is aborted.
  bool handle(const SmmuEvent::Words& words);

  void on_answer(const FaultGroup& group, FaultAnswer answer) override;

 private:
  SmmuStalls& smmu_;
  FaultSink& sink_;
};

}  // namespace mvgpu::domain
