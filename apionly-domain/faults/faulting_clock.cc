// Which pages of a FaultingDomain go: when there is no room, and when the device has no use for
// them.

#include "apionly-domain/faults/faulting_domain.h"

namespace mvgpu::domain {

bool FaultingDomain::TakeUsedLocked(Block& block, uint64_t index) {
  const bool was_accessed = parts_.target->take_accessed(Iova(BytesIn(block.first_page + index)));
  const bool was_used = block.used.test(index) || was_accessed;
  block.used.clear({index, 1});
  return was_used;
}

uint64_t FaultingDomain::SweepLocked(Block& block, uint64_t* index, uint64_t wanted, bool any) {
  PageBits going;
  uint64_t found = 0;
  uint64_t at = block.mapped.find(*index, kBlockPages, true);
  for (; at < kBlockPages && found < wanted; at = block.mapped.find(at + 1, kBlockPages, true)) {
    if (TakeUsedLocked(block, at) && !any) continue;
    going.set({at, 1});
    ++found;
  }
  *index = at;
  return TakeOutLocked(block, going, block.all());
}

uint64_t FaultingDomain::Evict(uint64_t wanted) {
  MutexLock lock(clock_mutex_);
  uint64_t gone = 0;
  // The rest of this lap and the next one may only have found pages that were used.
  for (unsigned laps = 0; gone < wanted && laps < 3;) {
    uint64_t index = hand_ % kBlockPages;
    const BlockHold hold = HoldNextBlock(hand_ - index);
    if (!hold) {
      hand_ = 0;
      ++laps;
      continue;
    }
    Block& block = *hold.get();
    if (block.first_page != hand_ - index) index = 0;
    MutexLock block_lock(block.mutex);
    gone += SweepLocked(block, &index, wanted - gone, /*any=*/laps == 2);
    hand_ = block.first_page + index;
  }
  count_.evicted += gone;
  return gone;
}

uint64_t FaultingDomain::DropUnusedLocked(Block& block) {
  PageBits going;
  for (uint64_t at = block.mapped.find(0, kBlockPages, true); at < kBlockPages;
       at = block.mapped.find(at + 1, kBlockPages, true)) {
    // Asked of the young ones too: what they were used for is of the period that ends.
    const bool was_used = TakeUsedLocked(block, at);
    if (!was_used && !block.young.test(at)) going.set({at, 1});
  }
  block.young.clear(block.all());
  return TakeOutLocked(block, going, block.all());
}

uint64_t FaultingDomain::drop_unused() {
  uint64_t gone = 0;
  for (uint64_t from = 0;; from += kBlockPages) {
    const BlockHold hold = HoldNextBlock(from);
    if (!hold) break;
    from = hold.get()->first_page;
    MutexLock lock(hold.get()->mutex);
    gone += DropUnusedLocked(*hold.get());
  }
  count_.evicted += gone;
  return gone;
}

}  // namespace mvgpu::domain
