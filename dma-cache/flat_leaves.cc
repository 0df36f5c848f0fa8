#include "dma-cache/flat_leaves.h"

#include <algorithm>

namespace mvgpu::dma {

FlatLeaves::Group& FlatLeaves::GetGroup(uint64_t group) {
  const uint64_t chunk = group / kChunkGroups;
  if (chunk >= chunks_.size()) chunks_.resize(chunk + 1);
  if (chunks_[chunk] == nullptr) {
    chunks_[chunk] = std::make_unique<Chunk>();
    memory_.open(chunk * kChunkGroups * kGroupBytes, kChunkGroups * kGroupBytes);
  }
  return GroupOf(group);
}

FlatLeaves::Leaf* FlatLeaves::take(uint64_t granule) {
  if (granule >= kNearGranules) return nullptr;
  if (std::find(left_.begin(), left_.end(), granule) != left_.end()) return nullptr;
  Group& group = GetGroup(granule / kGroupLeaves);
  ++group.used;
  if (!group.has_memory) ++groups_;
  group.has_memory = true;
  return static_cast<Leaf*>(memory_.data()) + granule;
}

void FlatLeaves::put(uint64_t granule, Leaf*, bool is_empty) {
  if (is_empty) {
    LeaveGroup(granule);
  } else {
    left_.push_back(granule);
  }
}

void FlatLeaves::LeaveGroup(uint64_t granule) {
  const uint64_t number = granule / kGroupLeaves;
  Group& group = GroupOf(number);
  if (--group.used != 0) return;
  group.empty_since = clock_;
  if (!group.waits) waiting_.push_back({number, clock_});
  group.waits = true;
}

void FlatLeaves::reclaim() {
  for (const uint64_t granule : left_) {
    Leaf* leaf = static_cast<Leaf*>(memory_.data()) + granule;
    for (size_t i = 0; i < kLeafEntries; ++i) leaf->set(i, 0);
    LeaveGroup(granule);
  }
  left_.clear();
}

void FlatLeaves::pass(uint64_t pages) {
  clock_ += pages;
  while (!waiting_.empty()) {
    const Waiting oldest = waiting_.front();
    Group& group = GroupOf(oldest.group);
    if (group.used == 0 && clock_ - oldest.since <= kPatience * groups_) return;
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
