#pragma once

// Primary fault logging (VT-d specification 4.1, section 7.3): a ring of fault records, the status
// register that says what happened, and the event that tells software to look.
//
//   - A fault of a sender (and PASID) for a page that is in the log already is not logged again.
//   - When the next record is still in use, the fault is lost and overflow is set; until software
//     clears that, all other faults are lost too.
//   - One event for each time that the status goes from nothing to something. A masked event is
//     kept, and comes when it is unmasked, unless software has cleared the status meanwhile.

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "apionly-domain/nested/table_walker.h"
#include "apionly-domain/viommu/masked_event.h"
#include "apionly-domain/viommu/vtd_entries.h"

namespace mvgpu::domain {

struct FaultRecord {
  SourceId source = 0;
  std::optional<Pasid> pasid = std::nullopt;
  uint64_t address = 0;  // the page counts
  uint8_t reason = 0;
  Wanted wanted;
  bool is_translation_request = false;
};

// Not thread-safe.
class FaultLog {
 public:
  class Owner {
   public:
    virtual ~Owner() = default;
    // The interrupt of FEDATA and FEADDR.
    virtual void on_fault_event() = 0;
  };
  // Bits of FSTS_REG.
  enum Status : uint32_t {
    kOverflow = 1 << 0,         // PFO
    kPending = 1 << 1,          // PPF: some record is in use
    kQueueError = 1 << 4,       // IQE
    kCompletionError = 1 << 5,  // ICE
    kTimeout = 1 << 6,          // ITE
  };
  // A fault record as software reads it: FRCD_REG.
  struct Words {
    uint64_t low = 0;
    uint64_t high = 0;
    bool operator==(const Words&) const = default;
  };
  static constexpr uint64_t kUsed = uint64_t{1} << 63;  // F, in the upper word

  // The owner outlives this. REQUIRES: 1 <= records <= 256.
  FaultLog(size_t records, Owner* owner);

  void record(const FaultRecord& fault);
  // Another reason for an event: kQueueError, kCompletionError, kTimeout.
  void raise(Status status);

  // FSTS_REG, with the record that set kPending in 15:8 (FRI).
  uint32_t status() const;
  // Software writes 1 to the bits of `status`. kPending goes with the records.
  void clear(uint32_t status);
  const Words& words(size_t index) const { return records_[index]; }
  size_t size() const { return records_.size(); }
  // Software writes 1 to F of a record. Does nothing for an index beyond the last one.
  void release(size_t index);

  // FECTL_REG: IM and IP.
  void set_masked(bool masked);
  bool is_event_pending() const { return event_.is_pending(); }

  uint64_t lost() const { return lost_; }            // faults, by overflow
  uint64_t collapsed() const { return collapsed_; }  // faults, into records that were there

 private:
  bool IsKnown(const Words& words) const;
  void Set(Status status);
  void DropEventIfIdle();

  Owner& owner_;  // outlives this: contract of the constructor
  std::vector<Words> records_;
  size_t next_ = 0;
  size_t first_ = 0;  // FRI: good with kPending
  uint32_t status_ = 0;
  MaskedEvent event_;
  uint64_t lost_ = 0;
  uint64_t collapsed_ = 0;
};

}  // namespace mvgpu::domain
