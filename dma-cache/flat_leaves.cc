#include "dma-cache/flat_leaves.h"

#include <algorithm>

namespace mvgpu::dma {

void FlatLeaves::OpenChunk(uint64_t chunk) {
  if (chunk >= chunks_.size()) chunks_.resize(chunk + 1);
  chunks_[chunk] = std::make_unique<Chunk>();
  // Whole windows: the kernel collapses no huge page out of two mappings.
  constexpr size_t kChunkBytes = kChunkGroups * kGroupBytes;
  const size_t last = ((chunk + 1) * kChunkBytes - 1) / kWindowBytes;
  if (last >= windows_.size()) windows_.resize(last + 1);
  for (size_t i = chunk * kChunkBytes / kWindowBytes; i <= last; ++i) {
    if (!windows_[i].is_open) memory_.open(i * kWindowBytes, kWindowBytes);
    windows_[i].is_open = true;
  }
}

void FlatLeaves::Touch(uint64_t granule, Group* group) {
  groups_ += group->touched == 0 ? 1 : 0;
  group->touched |= static_cast<uint16_t>(1u << granule % kGroupLeaves);
  if (Window& window = WindowOf(granule); ++window.touched >= kDense) MakeHuge(&window);
}

void FlatLeaves::MakeHuge(Window* window) {
  if (window->is_huge || clock_ < window->huge_from) return;
  window->is_huge = true;
  ++huge_windows_;
  window->huge_from = clock_ + kBetweenHuge;
  memory_.make_huge(static_cast<size_t>(window - windows_.data()) * kWindowBytes, kWindowBytes);
}

void FlatLeaves::GiveBack(uint64_t number) {
  memory_.give_back(number * kGroupBytes, kGroupBytes);
  --groups_;
  Group& group = GroupOf(number);
  for (uint64_t leaf = 0; leaf < kGroupLeaves; ++leaf) {
    Window& window = WindowOf(number * kGroupLeaves + leaf);
    window.touched -= group.touched >> leaf & 1;
    huge_windows_ -= window.is_huge ? 1 : 0;
    window.is_huge = false;
  }
  group.touched = 0;
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
      GiveBack(oldest.group);
    }
  }
}

}  // namespace mvgpu::dma
