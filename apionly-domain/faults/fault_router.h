#pragma once

// Takes faults off a queue and puts them right: in memory that is mapped on demand (the stage that
// is the host's), or by asking the guest (the stage that is the guest's).
//
// Where a guest has tables of its own (nested translation), a fault may be of either stage. Stage
// 2, guest-physical address to host memory, is resolved here and the guest never hears of it. Stage
// 1 is the guest's: its requests go on to the guest's own queue of faults, with the device address
// and the stage, and the guest's answer goes back to the device. Hardware that does not say the
// stage (page requests) is helped by a walk of the guest's tables.

#include <cstdint>
#include <optional>

#include "apionly-domain/base/error.h"
#include "apionly-domain/base/mutex.h"
#include "apionly-domain/faults/fault_queue.h"
#include "apionly-domain/faults/faulting_domain.h"
#include "apionly-domain/faults/page_request.h"
#include "apionly-domain/nested/table_walker.h"

namespace mvgpu::domain {

// Thread-safe: any number of threads may handle faults.
class FaultRouter final : public FaultSource {
 public:
  struct StageOne {
    const TableWalker* walker;
    uint64_t root;
  };
  // Which address spaces have tables of the guest.
  class Spaces {
   public:
    virtual ~Spaces() = default;
    // nullopt: none, its addresses are guest-physical.
    virtual std::optional<StageOne> stage_one(uint32_t device,
                                              std::optional<uint32_t> pasid) const = 0;
  };
  struct Parts {  // all outlive the router
    FaultQueue* queue;
    FaultingDomain* memory;
    const Spaces* spaces;  // null: no guest tables
    FaultSink* guest;      // null: nobody to ask
  };
  struct Counters {
    uint64_t groups = 0;
    uint64_t resolved = 0;      // groups, in memory
    uint64_t forwarded = 0;     // groups that the guest took
    uint64_t invalid = 0;       // groups that were answered so here
    uint64_t late_answers = 0;  // of the guest, for groups of which the device has gone
  };

  explicit FaultRouter(Parts parts) : parts_(parts) {}
  // REQUIRES: the guest has nothing to answer any more.
  ~FaultRouter() override;

  // Handles one group, as far as it does not need the guest. False: none waits.
  bool handle_one();

  void on_answer(const FaultGroup& group, FaultAnswer answer) override;
  Counters counters() const;

 private:
  enum class Verdict : uint8_t { kDone, kInvalid, kForGuest };
  // With kForGuest: fills in the stage.
  Verdict HandleRequest(const FaultGroup& group, PageRequest* request);
  Verdict InMemory(uint64_t guest_physical, FaultRights rights);
  void Forward(uint32_t cookie, FaultGroup group);
  void Answer(uint32_t cookie, FaultAnswer answer);

  const Parts parts_;
  mutable ExclusiveMutex mutex_;
  uint64_t forwarded_now_ ABSL_GUARDED_BY(mutex_) = 0;
  Counters counters_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace mvgpu::domain
