#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include <absl/container/btree_map.h>

#include "apionly-domain/base/address.h"
#include "apionly-domain/base/bits.h"
#include "dma-cache/flat_leaves.h"
#include "dma-cache/leaves.h"

namespace mvgpu::dma {

// From page number to page number, with flags: a page table in software, as domain::PageDirectory
// is, for targets that may lie anywhere.
//
//   chunk    1 GiB   one word per chunk below kNearChunks in a flat array, the others in a tree
//   granule  2 MiB   512 words per chunk, only where one run does not cover the whole chunk
//   leaf     4 KiB   512 packed entries per granule, only where no run covers the whole granule
//
// A word is 0 (nothing), a run (target of its first page, flags) or a node. Targets inside a run
// are computed. Entries of a leaf are packed into what nearly all of them need, as `Leaves` says,
// which also says where leaves are; a granule with an entry that does not fit, or of which the leaf
// cannot be had, has a leaf of whole words.
//
// Thread safety: one writer at a time. find_near() and NearTargets may run beside it, without a
// lock, in sections that the owner of the map knows; nodes that were taken out are used again only
// after reclaim(), when every section that was open has ended. What such a reader finds for a page
// that is being changed means nothing: it must know from elsewhere that the page is not.
// Everything else needs the writer's lock.
template <typename Leaves>
class PageMap : public PageMapFlags {
 public:
  struct Found {
    uint64_t word = 0;  // 0: nothing
    uint64_t left = 0;  // pages up to the end of what this word covers
    uint64_t target() const { return word >> kPageShift; }
    uint64_t flags() const { return word & kAllFlags; }
  };
  // Pages with targets that continue each other and with the same flags; kStart only where one
  // begins.
  struct Extent {
    PageRun pages;
    uint64_t target;
    uint64_t flags;
  };

  PageMap();
  ~PageMap();
  PageMap(const PageMap&) = delete;
  PageMap& operator=(const PageMap&) = delete;

  // Below 16 TiB only; for others nothing is found.
  Found find_near(uint64_t page) const {
    const uint64_t chunk = page >> kChunkShift;
    return chunk < kNearChunks ? FindIn(near_[chunk].load(std::memory_order_acquire), page)
                               : Found{0, 1};
  }
  Found find(uint64_t page) const {
    return page >> kChunkShift < kNearChunks ? find_near(page) : FindFar(page);
  }
  // Calls visit(Extent) for what is there, in order.
  template <typename Visit>
  void for_each(PageRun run, Visit visit) const {
    if (run.count != 1) return ForEachOfRun(run, visit);
    const Found found = find(run.first);
    if (found.word != 0) visit(Extent{run, found.target(), found.flags()});
  }

  // For who is about to map or unmap many pages one by one: each waits for its granule's word and
  // for its entry otherwise (tests/bench, "miss, page by page"). Inline: the compiler sees no
  // effect in a call of a function that only prefetches, and leaves it out.
  [[gnu::always_inline]] void prefetch(uint64_t page) const {
    prefetch_granule(page);
    leaves_.prefetch(page);
  }
  [[gnu::always_inline]] void prefetch_granule(uint64_t page) const {
    if (const Node* node = NearNode(page); node != nullptr) {
      __builtin_prefetch(&node->words[page >> kGranuleShift & (kGranulePages - 1)], /*rw=*/1);
    }
  }
  // REQUIRES: nothing is there.
  void map(PageRun run, uint64_t target, uint64_t flags) {
    if (run.count != 1 || !try_map(run.first, target, flags)) MapRun(run, target, flags);
  }
  // map() of a page that is new to a granule with a leaf or nothing in it, as nearly all misses
  // page by page are. False, and nothing is changed: something is there, or it is for map().
  bool try_map(uint64_t page, uint64_t target, uint64_t flags);
  void unmap(PageRun run) {
    if (run.count != 1 || !TryUnmapPage(run.first)) UnmapRun(run);
    leaves_.pass(run.count);
  }
  // Of the pages that are there.
  void change_flags(PageRun run, uint64_t set, uint64_t clear);
  // A piece begins at this page, if it is there.
  void start_at(uint64_t page) {
    const Found found = find(page);
    if (found.word != 0 && (found.word & kStart) == 0) change_flags({page, 1}, kStart, 0);
  }

  // See FlatLeaves::groups().
  uint64_t leaf_groups() const { return leaves_.groups(); }

  bool has_retired() const { return !retired_.empty() || leaves_.has_left(); }
  // REQUIRES: nobody reads nodes that were taken out before.
  void reclaim();

 private:
  friend class NearTargets;
  using Leaf = typename Leaves::Leaf;

  static constexpr unsigned kGranuleShift = 9;
  static constexpr unsigned kChunkShift = 18;
  static constexpr uint64_t kGranulePages = uint64_t{1} << kGranuleShift;
  static constexpr uint64_t kChunkPages = uint64_t{1} << kChunkShift;
  static constexpr uint64_t kNearChunks = uint64_t{1} << 14;
  // Words with kTable: flags, an address, and of a granule's how many entries are not 0.
  static constexpr uint64_t kAddress = (uint64_t{1} << 48) - 64;
  static constexpr unsigned kUsedShift = 48;

  struct alignas(64) Node {
    std::array<std::atomic<uint64_t>, kGranulePages> words{};
    // Of a chunk's, writer's: words that are not 0, and words that are a run or wide.
    uint32_t used = 0;
    uint32_t unflat = 0;
    static constexpr bool Fits(uint64_t) { return true; }
    uint64_t get(size_t i) const { return words[i].load(std::memory_order_relaxed); }
    void set(size_t i, uint64_t word) { words[i].store(word, std::memory_order_relaxed); }
  };

  static Node* NodeOf(uint64_t word) { return reinterpret_cast<Node*>(word & kAddress); }
  static Leaf* LeafOf(uint64_t word) { return reinterpret_cast<Leaf*>(word & kAddress); }
  static uint64_t WordFor(const void* node, uint64_t flags) {
    return reinterpret_cast<uint64_t>(node) | kTable | flags;
  }
  static uint64_t UsedOf(uint64_t word) { return word >> kUsedShift; }
  static uint64_t WithUsed(uint64_t word, uint64_t used) {
    return (word & LowestBits(kUsedShift)) | used << kUsedShift;
  }
  static bool IsUnflat(uint64_t word) { return word != 0 && (word & (kTable | kWide)) != kTable; }
  static uint64_t InLeaf(uint64_t word, size_t i) {
    return (word & kWide) != 0 ? NodeOf(word)->get(i) : LeafOf(word)->get(i);
  }
  static Found InRun(uint64_t word, uint64_t offset, uint64_t pages) {
    if (word == 0) return {0, pages - offset};
    return {offset == 0 ? word : (word & ~kStart) + (offset << kPageShift), pages - offset};
  }
  static Found FindIn(uint64_t word, uint64_t page) {
    if ((word & kTable) == 0) return InRun(word, page & (kChunkPages - 1), kChunkPages);
    const size_t i = page & (kGranulePages - 1);
    word = NodeOf(word)->words[page >> kGranuleShift & (kGranulePages - 1)].load(
        std::memory_order_acquire);
    if ((word & kTable) == 0) return InRun(word, i, kGranulePages);
    return {InLeaf(word, i), 1};
  }
  Found FindFar(uint64_t page) const;

  // Changes of words, see Update().
  struct Mapping;
  struct Unmapping;
  // Calls visit(part of the run, atomic word) for each chunk that is there.
  template <typename Visit>
  void ForEachChunk(PageRun run, Visit visit) const;
  // Sets what is there in the run, or everything if `create`, to change(word, page of the word).
  template <typename Change>
  void Update(PageRun run, bool create, const Change& change);
  template <typename Change>
  void UpdateChunk(std::atomic<uint64_t>& slot, PageRun run, bool create, const Change& change);
  template <typename Change>
  void UpdateGranule(std::atomic<uint64_t>& slot, PageRun run, bool create, const Change& change);
  // Adds to *used how many more entries are not 0. False: an entry does not fit; `*run` begins
  // there.
  template <typename Entries, typename Change>
  static bool UpdateLeaf(Entries* leaf, PageRun* run, const Change& change, uint64_t* used);
  template <typename Entries>
  static bool UpdateLeaf(Entries* leaf, PageRun* run, const Mapping& mapping, uint64_t* used);
  template <typename Entries>
  static bool UpdateLeaf(Entries* leaf, PageRun* run, const Unmapping& unmapping, uint64_t* used);
  template <typename Visit>
  void ForEachOfRun(PageRun run, Visit& visit) const;
  void MapRun(PageRun run, uint64_t target, uint64_t flags);
  void UnmapRun(PageRun run);
  // As try_map(). The chunk's node stays when nothing is left in it: single pages come and go.
  bool TryUnmapPage(uint64_t page);
  // The node of a near chunk; null where there is none.
  Node* NearNode(uint64_t page) const {
    const uint64_t chunk = page >> kChunkShift;
    const uint64_t word = chunk < near_end_ ? near_[chunk].load(std::memory_order_relaxed) : 0;
    return (word & kTable) != 0 ? NodeOf(word) : nullptr;
  }
  uint64_t ExpandChunk(uint64_t word);
  uint64_t ExpandGranule(uint64_t word, uint64_t granule);
  uint64_t Widen(uint64_t word, uint64_t granule);
  void FreeChunk(uint64_t word);

  std::unique_ptr<std::atomic<uint64_t>[]> near_;
  uint64_t near_end_ = 0;  // behind the highest near chunk that was ever there; writer's
  absl::btree_map<uint64_t, std::unique_ptr<std::atomic<uint64_t>>> far_;
  Leaves leaves_;
  SpareNodes<Node> spare_;
  std::vector<Node*> retired_;  // empty ones
};

template <typename Leaves>
template <typename Visit>
void PageMap<Leaves>::ForEachChunk(PageRun run, Visit visit) const {
  if (run.count == 0) return;
  const uint64_t last = (run.end() - 1) >> kChunkShift;
  const auto part_of = [run](uint64_t chunk) {
    const uint64_t first = std::max(run.first, chunk << kChunkShift);
    return PageRun{first, std::min(run.end(), (chunk + 1) << kChunkShift) - first};
  };
  uint64_t chunk = run.first >> kChunkShift;
  for (; chunk <= last && chunk < near_end_; ++chunk) visit(part_of(chunk), near_[chunk]);
  if (far_.empty()) return;
  for (auto it = far_.lower_bound(chunk); it != far_.end() && it->first <= last; ++it) {
    visit(part_of(it->first), *it->second);
  }
}

template <typename Leaves>
template <typename Visit>
void PageMap<Leaves>::ForEachOfRun(PageRun run, Visit& visit) const {
  Extent extent{{}, 0, 0};
  ForEachChunk(run, [&](PageRun part, const std::atomic<uint64_t>& slot) {
    const uint64_t word = slot.load(std::memory_order_relaxed);
    for (uint64_t page = part.first; page < part.end();) {
      const Found found = FindIn(word, page);
      const uint64_t count = std::min(found.left, part.end() - page);
      if (found.word != 0) {
        if (extent.pages.count != 0 && extent.pages.end() == page &&
            extent.target + extent.pages.count == found.target() &&
            (extent.flags & ~kStart) == found.flags()) {
          extent.pages.count += count;
        } else {
          if (extent.pages.count != 0) visit(extent);
          extent = {{page, count}, found.target(), found.flags()};
        }
      }
      page += count;
    }
  });
  if (extent.pages.count != 0) visit(extent);
}

extern template class PageMap<FlatLeaves>;
extern template class PageMap<HeapLeaves<PackedPages>>;

}  // namespace mvgpu::dma
