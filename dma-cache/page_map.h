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

namespace mvgpu::dma {

// From page number to page number, with flags: a page table in software, as domain::PageDirectory
// is, for targets that may lie anywhere.
//
//   chunk    1 GiB   one word per chunk below kNearChunks in a flat array, the others in a tree
//   granule  2 MiB   512 words per chunk, only where one run does not cover the whole chunk
//   leaf     4 KiB   512 packed entries per granule, only where no run covers the whole granule
//
// A word is 0 (nothing), a run (target of its first page, flags) or a node. Targets inside a run
// are computed. Entries of a leaf are packed into what nearly all of them need (`Leaf`); a granule
// with one that does not fit has a leaf of whole words.
//
// Thread safety: one writer at a time. find_near() and Near may run beside it, without a
// lock, in sections that the owner of the map knows; nodes that were taken out are used again only
// after reclaim(), when every section that was open has ended. What such a reader finds for a page
// that is being changed means nothing: it must know from elsewhere that the page is not.
// Everything else needs the writer's lock.
struct PageMapFlags {
  static constexpr uint64_t kTable = 1;  // of words: a node, not a run
  static constexpr uint64_t kWide = 2;   // of words with kTable: a leaf of whole words

  static constexpr uint64_t kRead = 2;  // flags of runs
  static constexpr uint64_t kWrite = 4;
  static constexpr uint64_t kGoing = 8;         // about to be revoked: no new holds
  static constexpr uint64_t kStart = 16;        // a piece of the mapper's begins here
  static constexpr uint64_t kPinnedRead = 32;   // pinned for reading,
  static constexpr uint64_t kPinnedWrite = 64;  // for writing,
  static constexpr uint64_t kReadAsRuns = 128;  // in pins that the domain counts as runs
  static constexpr uint64_t kWriteAsRuns = 256;
  static constexpr uint64_t kAllFlags = 0x1fe;
};

// 40 bits of page (52-bit addresses) and all flags in 6 bytes; entries do not cross cache lines.
struct PackedTargets {
  static constexpr bool Fits(uint64_t word) { return word >> 52 == 0; }
  uint64_t get(size_t i) const {
    const Line& line = lines[i / kPerLine];
    // Relaxed, here and below: see the class comment.
    const uint64_t packed = uint64_t{line.high[i % kPerLine].load(std::memory_order_relaxed)}
                                << 32 |
                            line.low[i % kPerLine].load(std::memory_order_relaxed);
    return packed >> 8 << kPageShift | (packed & 0xff) << 1;
  }
  void set(size_t i, uint64_t word) {
    const uint64_t packed = word >> kPageShift << 8 | (word & PageMapFlags::kAllFlags) >> 1;
    Line& line = lines[i / kPerLine];
    line.low[i % kPerLine].store(static_cast<uint32_t>(packed), std::memory_order_relaxed);
    line.high[i % kPerLine].store(static_cast<uint16_t>(packed >> 32), std::memory_order_relaxed);
  }
  const void* line_of(size_t i) const { return &lines[i / kPerLine]; }

  static constexpr size_t kPerLine = 10;
  struct alignas(64) Line {
    std::array<std::atomic<uint32_t>, kPerLine> low{};
    std::array<std::atomic<uint16_t>, kPerLine> high{};
  };
  std::array<Line, (512 + kPerLine - 1) / kPerLine> lines;
  uint32_t used = 0;  // entries that are not 0; writer's
};

// Pages below 2^32 - 1 with the flag kRead in 4 bytes; where pieces begin is forgotten. Plain
// numbers, which the compiler fills and clears four at a time: for maps that nobody reads without
// the writer's lock.
struct PackedPages {
  static constexpr bool Fits(uint64_t word) {
    constexpr uint64_t kOthers = PageMapFlags::kAllFlags & ~PageMapFlags::kStart;
    return word >> kPageShift < UINT32_MAX && (word & kOthers) == PageMapFlags::kRead;
  }
  uint64_t get(size_t i) const {
    const uint32_t packed = entries[i];
    return packed == 0 ? 0 : uint64_t{packed - 1} << kPageShift | PageMapFlags::kRead;
  }
  void set(size_t i, uint64_t word) {
    // 0 for nothing, otherwise one more than the page: what is there has kRead.
    const uint64_t one = (word & PageMapFlags::kRead) / PageMapFlags::kRead;
    entries[i] = static_cast<uint32_t>((word >> kPageShift) + one);
  }
  const void* line_of(size_t i) const { return &entries[i]; }

  std::array<uint32_t, 512> entries{};
  uint32_t used = 0;
};

template <typename Leaf>
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
  // find_near() for loops, in two steps: a pointer that the compiler can keep in a register, and
  // functions that call nothing.
  class Near {
   public:
    explicit Near(const PageMap& map) : chunks_(map.near_.get()) {}
    // The page's word, but where the page has an entry of its own: the leaf, with that entry on its
    // way into the processor's cache.
    uint64_t look_up(uint64_t page) const;
    // The page's word, from what look_up() said. Without kRead or kWrite: nothing, whatever else it
    // says. kStart means nothing.
    static uint64_t WordOf(uint64_t looked_up, uint64_t page) {
      if ((looked_up & kTable) == 0) return looked_up;
      return InLeaf(looked_up, page & (kGranulePages - 1));
    }

   private:
    const std::atomic<uint64_t>* chunks_;
  };

  // Calls visit(Extent) for what is there, in order.
  template <typename Visit>
  void for_each(PageRun run, Visit visit) const;

  // REQUIRES: nothing is there.
  void map(PageRun run, uint64_t target, uint64_t flags);
  void unmap(PageRun run);
  // Of the pages that are there.
  void change_flags(PageRun run, uint64_t set, uint64_t clear);
  // A piece begins at this page, if it is there.
  void start_at(uint64_t page);

  bool has_retired() const { return !retired_.empty(); }
  // REQUIRES: nobody reads nodes that were taken out before.
  void reclaim();

 private:
  static constexpr unsigned kGranuleShift = 9;
  static constexpr unsigned kChunkShift = 18;
  static constexpr uint64_t kGranulePages = uint64_t{1} << kGranuleShift;
  static constexpr uint64_t kChunkPages = uint64_t{1} << kChunkShift;
  static constexpr uint64_t kNearChunks = uint64_t{1} << 14;
  static constexpr size_t kMostSpare = 64;

  struct alignas(64) Node {
    std::array<std::atomic<uint64_t>, kGranulePages> words{};
    uint32_t used = 0;  // words that are not 0; writer's
    static constexpr bool Fits(uint64_t) { return true; }
    uint64_t get(size_t i) const { return words[i].load(std::memory_order_relaxed); }
    void set(size_t i, uint64_t word) { words[i].store(word, std::memory_order_relaxed); }
  };
  struct alignas(64) PackedNode : Leaf {};

  static Node* NodeOf(uint64_t word) { return reinterpret_cast<Node*>(word & ~uint64_t{63}); }
  static PackedNode* PackedOf(uint64_t word) {
    return reinterpret_cast<PackedNode*>(word & ~uint64_t{63});
  }
  static uint64_t InLeaf(uint64_t word, size_t i) {
    return (word & kWide) != 0 ? NodeOf(word)->get(i) : PackedOf(word)->get(i);
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
  // False: an entry does not fit; `*run` begins there.
  template <typename Entries, typename Change>
  bool UpdateLeaf(Entries* leaf, PageRun* run, const Change& change);
  template <typename Entries>
  bool UpdateLeaf(Entries* leaf, PageRun* run, const Mapping& mapping);
  template <typename Entries>
  bool UpdateLeaf(Entries* leaf, PageRun* run, const Unmapping& unmapping);
  uint64_t ExpandChunk(uint64_t word);
  uint64_t ExpandGranule(uint64_t word);
  uint64_t Widen(uint64_t word);
  void FreeChunk(uint64_t word);
  template <typename Any>
  static Any* MakeNode(std::vector<std::unique_ptr<Any>>* spare);

  std::unique_ptr<std::atomic<uint64_t>[]> near_;
  uint64_t near_end_ = 0;  // behind the highest near chunk that was ever there; writer's
  absl::btree_map<uint64_t, std::unique_ptr<std::atomic<uint64_t>>> far_;
  std::vector<uint64_t> retired_;  // words of nodes
  // Empty ones, kept for the next: who maps and unmaps single pages would make one each time.
  std::vector<std::unique_ptr<PackedNode>> spare_;
  std::vector<std::unique_ptr<Node>> spare_nodes_;
};

template <typename Leaf>
inline uint64_t PageMap<Leaf>::Near::look_up(uint64_t page) const {
  const uint64_t chunk = page >> kChunkShift;
  if (chunk >= kNearChunks) return 0;
  uint64_t word = chunks_[chunk].load(std::memory_order_acquire);
  if ((word & kTable) == 0) return word + ((page & (kChunkPages - 1)) << kPageShift);
  word = NodeOf(word)->words[page >> kGranuleShift & (kGranulePages - 1)].load(
      std::memory_order_acquire);
  const size_t i = page & (kGranulePages - 1);
  if ((word & kTable) == 0) return word + (i << kPageShift);
  __builtin_prefetch(PackedOf(word)->line_of(i));  // of a leaf of whole words, a line nearby
  return word;
}

template <typename Leaf>
template <typename Visit>
void PageMap<Leaf>::ForEachChunk(PageRun run, Visit visit) const {
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

template <typename Leaf>
template <typename Visit>
void PageMap<Leaf>::for_each(PageRun run, Visit visit) const {
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

extern template class PageMap<PackedTargets>;
extern template class PageMap<PackedPages>;

}  // namespace mvgpu::dma
