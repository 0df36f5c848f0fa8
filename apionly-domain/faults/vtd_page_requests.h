#pragma once

// Both ends of VT-d's page request queue: a ring of 32-byte entries in memory, with registers.
//
//   VtdPageRequestQueue     the IOMMU's end: writes entries for the groups of devices, and answers
//                           the devices when a page group response descriptor comes
//   VtdPageRequestHandler   the driver's end: reads entries, puts groups together, and turns the
//                           answers that it gets into descriptors
//
// A host's driver and the IOMMU of the machine meet here, and so do a guest's driver and an
// emulated IOMMU: the ring is guest memory then.

#include <cstdint>
#include <functional>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include <absl/container/btree_map.h>

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/base/mutex.h"
#include "apionly-domain/faults/page_request.h"
#include "apionly-domain/faults/vtd_page_records.h"

namespace mvgpu::domain {

// Thread-safe. Sources and the owner are called without its lock.
class VtdPageRequestQueue final : public FaultSink {
 public:
  // Bits of the status register.
  static constexpr uint32_t kPending = 1;   // PPR: there may be entries
  static constexpr uint32_t kOverflow = 2;  // PRO: entries are dropped until this is cleared

  class Owner {
   public:
    virtual ~Owner() = default;
    // A bit of the status became set: an interrupt.
    virtual void on_page_request_event() = 0;
  };
  struct Counters {
    uint64_t entries = 0;
    uint64_t dropped = 0;
    uint64_t waiting = 0;  // groups now
  };

  // Both outlive the queue; `owner` may be null.
  VtdPageRequestQueue(ApiOnlyDomain* memory, Owner* owner) : memory_(*memory), owner_(owner) {}
  // Answers what waits, as drop_all().
  ~VtdPageRequestQueue() override { drop_all(); }

  // Registers. The address is base | order: the ring has 128 << order entries. Setting it empties
  // the queue. Head and tail are in bytes.
  void set_address(uint64_t address);
  uint64_t address() const;
  uint64_t head() const;
  uint64_t tail() const;
  // Bits that mean no entry of the ring are ignored, as hardware does.
  void set_head(uint64_t head);
  uint32_t status() const;
  void clear_status(uint32_t bits);

  // An entry for each request, the last one marked. Group ids are of 9 bits, devices are requester
  // ids. Errors: also kInvalid (numbers that do not fit), kBusy (a group of this id waits), those
  // of ApiOnlyDomain::write(). After an overflow some entries of the group stand in the ring
  // without a last one; the driver discards them.
  Result<void> submit(FaultGroup group, FaultSource* source) override;
  // Error: kInvalid (not a response; no group waits for it).
  Result<void> respond(const VtdGroupResponse::Words& words);
  // The device is reset, or all are: their groups are answered with kInvalid. Returns how many.
  size_t drop(uint16_t requester);
  size_t drop_all();

  Counters counters() const;

 private:
  using Key = std::tuple<uint16_t, std::optional<uint32_t>, uint16_t>;
  struct Waiting {
    FaultGroup group;
    FaultSource* source;  // outlives the answer: contract of submit()
  };

  uint64_t RingBytesLocked() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return kPageSize << (address_ & 7);
  }
  Result<void> WriteEntriesLocked(const FaultGroup& group, bool* interrupts)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  Result<void> WriteEntryLocked(const VtdPageRequest& request, bool* interrupts)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void SetStatusLocked(uint32_t bit, bool* interrupts) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  size_t Drop(const std::function<bool(const Key&)>& is_going);

  ApiOnlyDomain& memory_;  // outlives this
  Owner* const owner_;     // outlives this

  mutable ExclusiveMutex mutex_;
  uint64_t address_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t head_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t tail_ ABSL_GUARDED_BY(mutex_) = 0;
  uint32_t status_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::btree_map<Key, Waiting> waiting_ ABSL_GUARDED_BY(mutex_);
  Counters counters_ ABSL_GUARDED_BY(mutex_);
};

// Thread-safe: poll() comes from one thread at a time, answers from any.
class VtdPageRequestHandler final : public FaultSource {
 public:
  struct Options {
    // Requests whose group has no last one yet. What comes beyond is not kept: the device asks for
    // it again when the rest of its group is answered.
    uint64_t max_partial_requests = 1024;
    // Whether a device is served; the others are answered with kInvalid.
    std::function<bool(uint16_t requester)> knows = [](uint16_t) { return true; };
  };
  struct Counters {
    uint64_t entries = 0;
    uint64_t groups = 0;  // handed on
    uint64_t stop_markers = 0;
    uint64_t bad = 0;        // entries
    uint64_t discarded = 0;  // requests: after an overflow, or too many without a last one
    uint64_t overflows = 0;
  };

  // All outlive the handler, which outlives the answers to what it submitted.
  VtdPageRequestHandler(ApiOnlyDomain* memory, VtdPageRequestQueue* iommu, FaultSink* sink,
                        Options options)
      : memory_(*memory), iommu_(*iommu), sink_(*sink), options_(std::move(options)) {}

  // Handles what is in the ring now. Errors: those of ApiOnlyDomain::read(); it goes on where it
  // stopped the next time.
  Result<void> poll();

  void on_answer(const FaultGroup& group, FaultAnswer answer) override;
  Counters counters() const;

 private:
  using Key = std::pair<uint16_t, uint16_t>;  // requester, group
  Result<VtdPageRequest::Words> ReadEntry(uint64_t offset) const;
  void HandleEntryLocked(const VtdPageRequest::Words& words) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void KeepLocked(const VtdPageRequest& request) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void CompleteLocked(const VtdPageRequest& last) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void ClearOverflowLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  bool IsBad(const VtdPageRequest& request) const;
  void Answer(const VtdGroupResponse& response);

  ApiOnlyDomain& memory_;
  VtdPageRequestQueue& iommu_;
  FaultSink& sink_;
  const Options options_;

  mutable ExclusiveMutex mutex_;
  absl::btree_map<Key, std::vector<PageRequest>> partial_ ABSL_GUARDED_BY(mutex_);
  uint64_t partial_requests_ ABSL_GUARDED_BY(mutex_) = 0;
  std::vector<FaultGroup> complete_ ABSL_GUARDED_BY(mutex_);
  std::vector<VtdGroupResponse> refused_ ABSL_GUARDED_BY(mutex_);
  Counters counters_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace mvgpu::domain
