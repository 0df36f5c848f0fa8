#include "dma-cache/flat_leaves.h"

#include <algorithm>

namespace mvgpu::dma {

void FlatLeaves::OpenChunk(uint64_t chunk) {
  if (chunk >= chunks_.size()) chunks_.resize(chunk + 1);
  chunks_[chunk] = std::make_unique<Chunk>();
  memory_.open(chunk * kChunkGroups * kGroupBytes, kChunkGroups * kGroupBytes);
}

bool FlatLeaves::IsLeft(uint64_t granule) const {
  return std::find(left_.begin(), left_.end(), granule) != left_.end();
}

void FlatLeaves::WaitEmpty(uint64_t number, Group* group) {
  group->empty_since = clock_;
  if (!group->waits) waiting_.push_back({number, clock_});
  group->waits = true;
}

void FlatLeaves::reclaim() {
  for (const uint64_t granule : left_) {
    Leaf* leaf = static_cast<Leaf*>(memory_.data()) + granule;
    for (size_t i = 0; i < kLeafEntries; ++i) leaf->set(i, 0);
    LeaveGroup(granule);
  }
  left_.clear();
}

void FlatLeaves::GiveBackWhatWaited() {
  while (!waiting_.empty()) {
    const Waiting oldest = waiting_.front();
    Group& group = GroupOf(oldest.group);
    look_at_ = oldest.since + kPatience * groups_ + 1;
    if (group.used == 0 && clock_ < look_at_) return;
    waiting_.pop_front();
    group.waits = group.used == 0 && group.empty_since != oldest.since;
    if (group.waits) {
      waiting_.push_back({oldest.group, group.empty_since});
    } else if (group.used == 0) {
      memory_.give_back(oldest.group * kGroupBytes, kGroupBytes);
      group.has_memory = false;
      --groups_;
    }
  }
}

}  // namespace mvgpu::dma
