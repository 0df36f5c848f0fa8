#pragma once

// Faults that wait for somebody to handle them: iommufd's fault queue object (Linux,
// drivers/iommu/iommufd/eventq.c), with the byte formats of its read(2) and write(2) and typed
// calls beside them.
//
//   submit --> [waiting] -- read, take --> [taken: has a cookie] -- write, answer --> the source
//
// Groups are taken whole and in order, and may be answered in any order. A cookie names one group
// for good: cookies count up, so an answer that is late, double or made up finds nobody (Linux
// hands the lowest free one out again). detach() and close() answer what is there with kInvalid.

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include <absl/container/btree_map.h>

#include "apionly-domain/base/error.h"
#include "apionly-domain/base/mutex.h"
#include "apionly-domain/base/unique_fd.h"
#include "apionly-domain/faults/fault_times.h"
#include "apionly-domain/faults/page_request.h"

namespace mvgpu::domain {

// The uapi's struct iommu_hwpt_pgfault.
struct HwptPageFault {
  static constexpr uint32_t kPasidValid = 1;
  static constexpr uint32_t kLastPage = 2;
  uint32_t flags = 0;
  uint32_t device = 0;
  uint32_t pasid = 0;
  uint32_t group = 0;
  uint32_t rights = 0;
  uint32_t reserved = 0;
  uint64_t address = 0;
  uint32_t length = 0;  // a hint, always 0
  uint32_t cookie = 0;
};
static_assert(sizeof(HwptPageFault) == 40 && offsetof(HwptPageFault, address) == 24);

// The uapi's struct iommu_hwpt_page_response.
struct HwptPageResponse {
  uint32_t cookie = 0;
  uint32_t code = 0;
};
static_assert(sizeof(HwptPageResponse) == 8);

// Thread-safe. Sources are called without its lock.
class FaultQueue final : public FaultSink {
 public:
  struct Options {
    // Of groups that wait or are taken, together: what a device may make us remember.
    uint64_t max_requests = 4096;
  };
  struct Taken {
    uint32_t cookie = 0;
    FaultGroup group;
  };
  struct Counters {
    uint64_t waiting = 0;  // groups now
    uint64_t taken = 0;    // groups now, not answered yet
    uint64_t accepted = 0;
    uint64_t refused = 0;        // by the limit
    uint64_t answered = 0;       // by a handler
    uint64_t auto_answered = 0;  // kInvalid, by detach() and close()
  };

  // `times` (may be null) must outlive the queue. Errors: kSystem (no descriptor left).
  static Result<std::unique_ptr<FaultQueue>> Create(Options options, FaultTimes* times);
  // Answers whatever is left, as close().
  ~FaultQueue() override { close(); }

  Result<void> submit(FaultGroup group, FaultSource* source) override;

  // As read(2) of the descriptor: copies as many whole groups as fit, and returns the bytes; 0 when
  // none waits or the first does not fit. Error: ESPIPE, the size is not a multiple of a record's.
  Result<size_t> read(std::span<std::byte> records);
  // As write(2): goes through responses up to the first that is wrong, and returns the bytes of
  // those before it. Errors for the first response: EINVAL (unknown cookie or code); ESPIPE as
  // read().
  Result<size_t> write(std::span<const std::byte> responses);

  // The same for a handler in this process. nullopt: none waits.
  std::optional<Taken> take();
  // Error: kInvalid, no group that is taken has this cookie.
  Result<void> answer(uint32_t cookie, FaultAnswer answer);

  // Readable, for poll(2), exactly while a group waits. Not to be read or written by others.
  int poll_fd() const { return event_.get(); }

  // The device goes, or one of its address spaces with `pasid`: answers its groups. Returns how
  // many.
  size_t detach(uint32_t device, std::optional<uint32_t> pasid = std::nullopt);
  // Answers all groups and accepts none from now on.
  void close();

  Counters counters() const;

 private:
  struct Entry {
    FaultGroup group;
    FaultSource* source;  // outlives the answer: contract of submit()
    FaultClock::time_point queued_at;
  };
  using Entries = std::vector<Entry>;

  FaultQueue(Options options, UniqueFd event, FaultTimes* times)
      : options_(options), event_(std::move(event)), times_(times) {}

  uint32_t TakeFirstLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void UpdateEventLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Moves the groups of which is_going(group) is true out of both lists.
  template <typename IsGoing>
  Entries RemoveLocked(const IsGoing& is_going) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  size_t AutoAnswer(Entries going);
  void Tell(const Entry& entry, FaultAnswer answer);

  const Options options_;
  const UniqueFd event_;
  FaultTimes* const times_;  // outlives this, see Create()

  mutable ExclusiveMutex mutex_;
  std::deque<Entry> waiting_ ABSL_GUARDED_BY(mutex_);
  absl::btree_map<uint32_t, Entry> taken_ ABSL_GUARDED_BY(mutex_);  // by cookie
  uint32_t last_cookie_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t requests_ ABSL_GUARDED_BY(mutex_) = 0;
  bool is_closed_ ABSL_GUARDED_BY(mutex_) = false;
  bool event_is_set_ ABSL_GUARDED_BY(mutex_) = false;
  Counters counters_ ABSL_GUARDED_BY(mutex_);  // without waiting and taken
};

}  // namespace mvgpu::domain
