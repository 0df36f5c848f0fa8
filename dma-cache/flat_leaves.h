#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "apionly-domain/base/reserved_memory.h"
#include "dma-cache/leaves.h"

namespace mvgpu::dma {

// Leaves at computed addresses: the entry of each page below 16 TiB has its place in one array of
// 26 GiB of addresses, so a reader asks for an entry as soon as it knows the page, and need not
// wait for a pointer to come first (tests/bench, "scattered device addresses").
//
// The array has memory where leaves are in use, and for a while afterwards: 16 leaves have 13
// pages, which are given back when they have been empty for so long that kPatience times as
// many pages were unmapped meanwhile as there are groups with memory. So a group that is used again
// and again keeps its memory, and what a use of the past left behind goes with the next one.
//
// Entries that are used together lie anywhere in 1.6 MiB for each GiB of RAM, more pages than a TLB
// has entries for. So where half of the leaves in 2 MiB of the array have memory, it asks the
// kernel for a huge page there, which at most doubles the memory (tests/bench, "4096 hot pages").
//
// One writer at a time; entries may be read beside it as PageMap says.
class FlatLeaves {
 public:
  using Leaf = PackedTargets;
  static constexpr uint64_t kNearGranules = uint64_t{1} << 23;

  FlatLeaves() : memory_(kNearGranules * sizeof(Leaf)) {}

  // By granule.
  const Leaf* leaves() const { return static_cast<const Leaf*>(memory_.data()); }

  // An empty leaf for the granule; null where there is none: from 16 TiB on, and while readers may
  // still see entries of the granule's that went elsewhere. REQUIRES: the last one was put back.
  Leaf* take(uint64_t granule);
  // What is not empty stays as it is until reclaim().
  void put(uint64_t granule, Leaf* leaf, bool is_empty);
  // With the whole map.
  void discard(Leaf*) {}
  bool has_left() const { return !left_.empty(); }  // something for reclaim()
  // REQUIRES: nobody reads leaves that were put back before.
  void reclaim();
  // So many pages were unmapped.
  void pass(uint64_t pages) {
    clock_ += pages;
    if (!waiting_.empty() && clock_ >= look_at_) GiveBackWhatWaited();
  }

  // Asks for the entry of a page: for who is about to map many pages one by one.
  [[gnu::always_inline]] void prefetch(uint64_t page) const {
    if (page / kLeafEntries >= kNearGranules) return;
    __builtin_prefetch(leaves()[page / kLeafEntries].at(page % kLeafEntries), /*rw=*/1);
  }

  // Groups that have memory.
  uint64_t groups() const { return groups_; }
  // Windows in which huge pages were asked for, and nothing was given back since.
  uint64_t huge_windows() const { return huge_windows_; }

 private:
  static constexpr uint64_t kGroupLeaves = 16;
  static constexpr size_t kGroupBytes = kGroupLeaves * sizeof(Leaf);
  static_assert(kGroupBytes % kPageSize == 0);
  static constexpr uint64_t kChunkGroups = 32;  // 1 GiB: opened together
  static constexpr uint64_t kPatience = 16;
  static constexpr size_t kWindowBytes = ReservedMemory::kHugePage;
  static constexpr uint64_t kDense = kWindowBytes / sizeof(Leaf) / 2;
  // Of the clock, between two huge pages for the same window: some 10 ms of unmapping page by page,
  // against the 0.3 ms that the kernel takes.
  static constexpr uint64_t kBetweenHuge = 1 << 16;

  struct Group {
    uint64_t empty_since = 0;
    uint16_t touched = 0;  // a bit for each leaf that was in use since the group has memory
    uint8_t used = 0;      // leaves
    bool waits = false;    // stands in waiting_
  };
  struct Waiting {
    uint64_t group;
    uint64_t since;
  };
  struct Window {
    uint64_t huge_from = 0;  // of the clock: not before
    uint32_t touched = 0;    // leaves that begin in it
    bool is_open = false;
    bool is_huge = false;
  };
  using Chunk = std::array<Group, kChunkGroups>;

  Group& GroupOf(uint64_t group) { return (*chunks_[group / kChunkGroups])[group % kChunkGroups]; }
  Group& GetGroup(uint64_t group) {
    if (group / kChunkGroups >= chunks_.size() || chunks_[group / kChunkGroups] == nullptr) {
      OpenChunk(group / kChunkGroups);
    }
    return GroupOf(group);
  }
  Window& WindowOf(uint64_t granule) { return windows_[granule * sizeof(Leaf) / kWindowBytes]; }
  void OpenChunk(uint64_t chunk);
  void Touch(uint64_t granule, Group* group);
  void MakeHuge(Window* window);
  bool IsLeft(uint64_t granule) const;
  void LeaveGroup(uint64_t granule) {
    Group& group = GroupOf(granule / kGroupLeaves);
    if (--group.used == 0) WaitEmpty(granule / kGroupLeaves, &group);
  }
  void WaitEmpty(uint64_t number, Group* group);
  void GiveBackWhatWaited();
  void GiveBack(uint64_t number);

  ReservedMemory memory_;
  std::vector<std::unique_ptr<Chunk>> chunks_;  // null where nothing was ever in use
  std::vector<Window> windows_;                 // up to the last one that is open
  std::vector<uint64_t> left_;                  // granules of leaves that are not empty yet
  // Groups that were empty once, each at most once, and since when.
  std::deque<Waiting> waiting_;
  uint64_t clock_ = 0;    // pages unmapped
  uint64_t look_at_ = 0;  // of the clock: nothing that waits is due before
  uint64_t groups_ = 0;
  uint64_t huge_windows_ = 0;
};

inline FlatLeaves::Leaf* FlatLeaves::take(uint64_t granule) {
  if (granule >= kNearGranules || (!left_.empty() && IsLeft(granule))) return nullptr;
  Group& group = GetGroup(granule / kGroupLeaves);
  ++group.used;
  if ((group.touched >> granule % kGroupLeaves & 1) == 0) [[unlikely]] {
    Touch(granule, &group);
  }
  return static_cast<Leaf*>(memory_.data()) + granule;
}

inline void FlatLeaves::put(uint64_t granule, Leaf*, bool is_empty) {
  if (is_empty) {
    LeaveGroup(granule);
  } else {
    left_.push_back(granule);
  }
}

}  // namespace mvgpu::dma
