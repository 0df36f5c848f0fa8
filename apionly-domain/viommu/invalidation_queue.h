#pragma once

// The queue through which software tells a remapping unit what it changed (VT-d specification 4.1,
// section 6.5.2): a ring of descriptors in guest memory. Software advances the tail (IQT), the unit
// does what the descriptors say and advances the head (IQH).
//
// An error stops the queue at the descriptor that caused it. Software sees FSTS.IQE, puts another
// descriptor there, or a tail that is one, and clears IQE: the unit goes on from the head, that is,
// fetches the same descriptor again.
//
// Descriptors are done one after the other, when the unit is given time for it, each of them
// completely, so there is nothing that a fence would have to wait for.

#include <cstdint>
#include <optional>

#include "apionly-domain/nested/guest_tables.h"
#include "apionly-domain/viommu/invalidation_descriptor.h"

namespace mvgpu::domain {

// Not thread-safe.
class InvalidationQueue {
 public:
  class Owner {
   public:
    virtual ~Owner() = default;
    // All but waits.
    virtual void on_invalidation(const InvalidationDescriptor& invalidation) = 0;
    // A wait's status; false when guest memory does not take it.
    virtual bool write_status(uint64_t address, uint32_t status) = 0;
    // A wait wants an interrupt: ICS.IWC.
    virtual void on_wait_complete() = 0;
    // FSTS.IQE.
    virtual void on_queue_error(QueueError error) = 0;
  };

  // The tables, where descriptors are read, and the owner outlive this.
  InvalidationQueue(DescriptorRules rules, const GuestTables* memory, Owner* owner)
      : rules_(rules), memory_(*memory), owner_(*owner) {}

  // IQA_REG: base 63:12, DW 11 (descriptors of 256 bits), log2 of the pages 2:0.
  void write_address(uint64_t iqa) { address_ = iqa; }
  // GCMD.QIE. The head is 0 when the queue is disabled.
  void enable() { is_enabled_ = true; }
  void disable();
  // IQT_REG: a byte offset.
  void write_tail(uint64_t iqt) { tail_ = iqt & kOffsetMask; }
  // After software has cleared FSTS.IQE.
  void clear_error() { error_.reset(); }

  // Does what is in the queue, at most `most` descriptors. The user runs the queue after each of
  // the writes above; as long as it has more, again, when others have had their turn.
  void run(uint64_t most);
  bool has_more() const { return is_enabled_ && !error_ && head_ != tail_; }

  uint64_t head() const { return head_; }
  uint64_t tail() const { return tail_; }
  bool is_enabled() const { return is_enabled_; }
  // IQERCD_REG; nullopt while the queue works.
  std::optional<QueueError> error() const { return error_; }

 private:
  static constexpr uint64_t kOffsetMask = 0x7'fff0;  // of head and tail
  static constexpr size_t kMostWords = 4;

  uint64_t Base() const { return address_ & ~kPageMask; }
  size_t Words() const { return (address_ >> 11 & 1) != 0 ? kMostWords : 2; }
  uint64_t Size() const { return kPageSize << (address_ & 7); }
  std::optional<QueueError> CheckTail() const;
  std::optional<QueueError> DoOne();
  std::optional<QueueError> Wait(const InvalidationWait& wait);

  const DescriptorRules rules_;
  const GuestTables& memory_;  // outlives this: contract of the constructor
  Owner& owner_;               // likewise
  uint64_t address_ = 0;
  uint64_t head_ = 0;
  uint64_t tail_ = 0;
  bool is_enabled_ = false;
  bool is_running_ = false;  // the owner's callbacks may write registers
  std::optional<QueueError> error_;
};

}  // namespace mvgpu::domain
