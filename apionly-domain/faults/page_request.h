#pragma once

// Faults of a device's accesses, on their way from the device to whoever can put them right, and
// the answer's way back.
//
//   VT-d page requests   vtd_page_requests.h --+                    +--> read and write of a user
//   SMMUv3 stalls        smmu_stalls.h --------+--> FaultQueue -----+--> FaultRouter --> memory,
//                                             (fault_queue.h)          (fault_router.h)  or the
//                                             guest
//
// A device asks in groups: it goes on when the whole group is answered. Every group that a sink
// accepted is answered exactly once, whatever happens to sink, device or handler meanwhile; one
// that was refused is not answered by the sink.

#include <chrono>
#include <cstdint>
#include <optional>
#include <vector>

#include "apionly-domain/access.h"
#include "apionly-domain/base/error.h"

namespace mvgpu::domain {

using FaultClock = std::chrono::steady_clock;

// What a device wanted to do, a set of these; values of iommu_hwpt_pgfault::perm.
using FaultRights = uint32_t;
inline constexpr FaultRights kFaultRead = 1;
inline constexpr FaultRights kFaultWrite = 2;
inline constexpr FaultRights kFaultExecute = 4;
inline constexpr FaultRights kFaultPrivileged = 8;

// What memory has to allow. To execute is to read.
constexpr Access AccessOfFault(FaultRights rights) {
  const bool writes = (rights & kFaultWrite) != 0;
  const bool reads = (rights & (kFaultRead | kFaultExecute)) != 0 || !writes;
  return static_cast<Access>((reads ? 1 : 0) | (writes ? 2 : 0));
}

struct PageRequest {
  FaultRights rights = 0;
  uint64_t address = 0;  // bytes; what the device put on the bus, down to the page where that is
                         // all that the hardware tells
  uint8_t stage = 0;     // of the tables that had no answer: 1, 2; 0: the hardware does not say
  uint64_t stage2_address = 0;  // with stage 2: what went into it
  bool operator==(const PageRequest&) const = default;
};

struct FaultGroup {
  uint32_t device = 0;  // as the front end numbers them: a requester id, a stream id
  std::optional<uint32_t> pasid;
  uint32_t id = 0;  // PRG index, STAG: what the device is answered with
  std::vector<PageRequest> requests{};
  FaultClock::time_point raised_at = FaultClock::now();  // by the device; for figures only
  uint64_t tag = 0;                                      // of who submitted it, for on_answer()
};

// Values of iommu_hwpt_page_response::code; kFailure is what VT-d and Linux have beyond these.
enum class FaultAnswer : uint8_t {
  kSuccess = 0,  // try again
  kInvalid = 1,  // the access is not to be
  kFailure = 2,  // nothing of this device is served any more
};

// Who has to be told the answer: a front end.
class FaultSource {
 public:
  virtual ~FaultSource() = default;
  // Once for each group that a sink accepted, from any thread, maybe before submit() returns.
  // Called without locks of the sink.
  virtual void on_answer(const FaultGroup& group, FaultAnswer answer) = 0;
};

// Where faults go.
class FaultSink {
 public:
  virtual ~FaultSink() = default;
  // `source` must outlive the answer. Errors: kLimit (too many are waiting), kRevoked (closed),
  // kInvalid (a group without requests); then there is no answer.
  virtual Result<void> submit(FaultGroup group, FaultSource* source) = 0;
};

}  // namespace mvgpu::domain
