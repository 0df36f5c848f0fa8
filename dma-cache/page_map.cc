#include "dma-cache/page_map.h"

#include "apionly-domain/base/check.h"

namespace mvgpu::dma {

template <typename Leaves>
PageMap<Leaves>::PageMap() : near_(std::make_unique<std::atomic<uint64_t>[]>(kNearChunks)) {}

template <typename Leaves>
PageMap<Leaves>::~PageMap() {
  for (uint64_t chunk = 0; chunk < near_end_; ++chunk) {
    FreeChunk(near_[chunk].load(std::memory_order_relaxed));
  }
  for (const auto& [chunk, word] : far_) FreeChunk(word->load(std::memory_order_relaxed));
  reclaim();
}

template <typename Leaves>
void PageMap<Leaves>::FreeChunk(uint64_t word) {
  if ((word & kTable) == 0) return;
  Node* node = NodeOf(word);
  for (const auto& child : node->words) {
    const uint64_t leaf = child.load(std::memory_order_relaxed);
    if ((leaf & kTable) == 0) continue;
    if ((leaf & kWide) != 0) {
      delete NodeOf(leaf);
    } else {
      leaves_.discard(LeafOf(leaf));
    }
  }
  delete node;
}

// Where nothing is.
template <typename Leaves>
struct PageMap<Leaves>::Mapping {
  uint64_t operator()(uint64_t, uint64_t page) const {
    return (offset + page) << kPageShift | flags | (page == first ? kStart : 0);
  }
  uint64_t first;
  uint64_t offset;  // from page to target; wraps where targets lie below, and so does the sum
  uint64_t flags;
};

template <typename Leaves>
struct PageMap<Leaves>::Unmapping {
  uint64_t operator()(uint64_t, uint64_t) const { return 0; }
};

template <typename Leaves>
typename PageMap<Leaves>::Found PageMap<Leaves>::FindFar(uint64_t page) const {
  const auto it = far_.find(page >> kChunkShift);
  const uint64_t word = it == far_.end() ? 0 : it->second->load(std::memory_order_relaxed);
  return FindIn(word, page);
}

template <typename Leaves>
void PageMap<Leaves>::MapRun(PageRun run, uint64_t target, uint64_t flags) {
  Update(run, /*create=*/true, Mapping{run.first, target - run.first, flags});
}

template <typename Leaves>
void PageMap<Leaves>::UnmapRun(PageRun run) {
  Update(run, /*create=*/false, Unmapping{});
}

template <typename Leaves>
void PageMap<Leaves>::change_flags(PageRun run, uint64_t set, uint64_t clear) {
  Update(run, /*create=*/false,
         [=](uint64_t word, uint64_t) { return word == 0 ? 0 : (word & ~clear) | set; });
}

template <typename Leaves>
bool PageMap<Leaves>::try_map(uint64_t page, uint64_t target, uint64_t flags) {
  const uint64_t word = target << kPageShift | flags | kStart;
  Node* node = NearNode(page);
  if (node == nullptr || !Leaf::Fits(word)) return false;
  auto& slot = node->words[page >> kGranuleShift & (kGranulePages - 1)];
  uint64_t granule = slot.load(std::memory_order_relaxed);
  if (granule == 0) {
    Leaf* leaf = leaves_.take(page >> kGranuleShift);
    if (leaf == nullptr) return false;
    ++node->used;
    granule = WordFor(leaf, 0);
  } else if ((granule & (kTable | kWide)) != kTable) {
    return false;
  }
  auto* entry = LeafOf(granule)->at(page & (kGranulePages - 1));
  if (Leaf::Load(entry) != 0) return false;
  Leaf::Store(entry, word);
  slot.store(WithUsed(granule, UsedOf(granule) + 1), std::memory_order_release);
  return true;
}

template <typename Leaves>
bool PageMap<Leaves>::TryUnmapPage(uint64_t page) {
  Node* node = NearNode(page);
  if (node == nullptr) return false;
  auto& slot = node->words[page >> kGranuleShift & (kGranulePages - 1)];
  const uint64_t granule = slot.load(std::memory_order_relaxed);
  if ((granule & (kTable | kWide)) != kTable) return granule == 0;
  Leaf* leaf = LeafOf(granule);
  auto* entry = leaf->at(page & (kGranulePages - 1));
  if (Leaf::Load(entry) == 0) return true;
  Leaf::Store(entry, 0);
  const uint64_t used = UsedOf(granule) - 1;
  slot.store(used == 0 ? 0 : WithUsed(granule, used), std::memory_order_release);
  if (used == 0) {
    leaves_.put(page >> kGranuleShift, leaf, /*is_empty=*/true);
    --node->used;
  }
  return true;
}

template <typename Leaves>
template <typename Change>
void PageMap<Leaves>::Update(PageRun run, bool create, const Change& change) {
  if (create) {
    for (uint64_t chunk = run.first >> kChunkShift; chunk <= (run.end() - 1) >> kChunkShift;
         ++chunk) {
      if (chunk < kNearChunks) {
        near_end_ = std::max(near_end_, chunk + 1);
      } else if (auto& slot = far_[chunk]; slot == nullptr) {
        slot = std::make_unique<std::atomic<uint64_t>>(0);
      }
    }
  }
  ForEachChunk(run, [&](PageRun part, const std::atomic<uint64_t>& slot) {
    UpdateChunk(const_cast<std::atomic<uint64_t>&>(slot), part, create, change);
  });
  if (create || run.count == 0 || far_.empty()) return;
  for (auto it = far_.lower_bound(run.first >> kChunkShift);
       it != far_.end() && it->first <= (run.end() - 1) >> kChunkShift;) {
    it = it->second->load(std::memory_order_relaxed) == 0 ? far_.erase(it) : std::next(it);
  }
}

template <typename Leaves>
template <typename Change>
void PageMap<Leaves>::UpdateChunk(std::atomic<uint64_t>& slot, PageRun run, bool create,
                                  const Change& change) {
  uint64_t word = slot.load(std::memory_order_relaxed);
  if (word == 0 && !create) return;
  if (run.count == kChunkPages && (word & kTable) != 0 && NodeOf(word)->used == 0) {
    retired_.push_back(NodeOf(word));
    word = 0;
  }
  if (run.count == kChunkPages && (word & kTable) == 0) {
    slot.store(change(word, run.first), std::memory_order_release);
    return;
  }
  const uint64_t old_word = word;
  if ((word & kTable) == 0) word = ExpandChunk(word);
  Node* node = NodeOf(word);
  for (uint64_t page = run.first; page < run.end();) {
    const uint64_t end = std::min(run.end(), (page | (kGranulePages - 1)) + 1);
    auto& child = node->words[page >> kGranuleShift & (kGranulePages - 1)];
    const uint64_t before = child.load(std::memory_order_relaxed);
    UpdateGranule(child, {page, end - page}, create, change);
    const uint64_t after = child.load(std::memory_order_relaxed);
    node->used += uint32_t{after != 0} - uint32_t{before != 0};
    node->unflat += uint32_t{IsUnflat(after)} - uint32_t{IsUnflat(before)};
    page = end;
  }
  word = node->used == 0 ? 0 : WordFor(node, node->unflat == 0 ? kFlat : uint64_t{0});
  // Readers in other threads want to keep what does not change.
  if (word != old_word) slot.store(word, std::memory_order_release);
  if (node->used == 0) retired_.push_back(node);
}

template <typename Leaves>
template <typename Change>
void PageMap<Leaves>::UpdateGranule(std::atomic<uint64_t>& slot, PageRun run, bool create,
                                    const Change& change) {
  uint64_t word = slot.load(std::memory_order_relaxed);
  if (word == 0 && !create) return;
  if (run.count == kGranulePages && (word & kTable) == 0) {
    slot.store(change(word, run.first), std::memory_order_release);
    return;
  }
  const uint64_t granule = run.first >> kGranuleShift;
  if ((word & kTable) == 0) word = ExpandGranule(word, granule);
  uint64_t used = UsedOf(word);
  if ((word & kWide) == 0 && !UpdateLeaf(LeafOf(word), &run, change, &used)) {
    word = Widen(word, granule);
  }
  if ((word & kWide) != 0) UpdateLeaf(NodeOf(word), &run, change, &used);
  slot.store(used == 0 ? 0 : WithUsed(word, used), std::memory_order_release);
  if (used != 0) return;
  if ((word & kWide) != 0) {
    retired_.push_back(NodeOf(word));
  } else {
    leaves_.put(granule, LeafOf(word), /*is_empty=*/true);
  }
}

template <typename Leaves>
template <typename Entries, typename Change>
bool PageMap<Leaves>::UpdateLeaf(Entries* leaf, PageRun* run, const Change& change,
                                 uint64_t* used) {
  uint64_t page = run->first;
  for (const uint64_t end = run->end(); page < end; ++page) {
    const size_t i = page & (kGranulePages - 1);
    const uint64_t old = leaf->get(i);
    const uint64_t word = change(old, page);
    if (word != 0 && !Entries::Fits(word)) break;
    leaf->set(i, word);
    *used += uint64_t{word != 0} - uint64_t{old != 0};
  }
  *run = {page, run->end() - page};
  return run->count == 0;
}

// The same for what is done to many entries at a time: a run that is not aligned as its targets are
// fills leaves, in the reverse map above all (tests/bench, "miss, 2 MiB").
template <typename Leaves>
template <typename Entries>
bool PageMap<Leaves>::UpdateLeaf(Entries* leaf, PageRun* run, const Mapping& mapping,
                                 uint64_t* used) {
  // What lies between fits if these do: targets ascend.
  if (!Entries::Fits(mapping(0, run->first)) || !Entries::Fits(mapping(0, run->end() - 1))) {
    return false;
  }
  const size_t first = run->first & (kGranulePages - 1);
  for (size_t i = 0; i < run->count; ++i) MVGPU_DCHECK(leaf->get(first + i) == 0);
  leaf->set(first, mapping(0, run->first));
  const uint64_t behind_start = mapping(0, run->first) & ~kStart;
  for (size_t i = 1; i < run->count; ++i) {
    leaf->set(first + i, behind_start + (i << kPageShift));
  }
  *used += run->count;
  return true;
}

template <typename Leaves>
template <typename Entries>
bool PageMap<Leaves>::UpdateLeaf(Entries* leaf, PageRun* run, const Unmapping&, uint64_t* used) {
  const size_t first = run->first & (kGranulePages - 1);
  uint64_t gone = 0;
  for (size_t i = first; i < first + run->count; ++i) {
    gone += leaf->get(i) != 0 ? 1 : 0;
    leaf->set(i, 0);
  }
  *used -= gone;
  return true;
}

template <typename Leaves>
uint64_t PageMap<Leaves>::ExpandChunk(uint64_t word) {
  Node* node = spare_.take();
  for (size_t i = 0; word != 0 && i < kGranulePages; ++i) {
    node->set(i, InRun(word, i << kGranuleShift, kChunkPages).word);
  }
  node->used = node->unflat = word != 0 ? static_cast<uint32_t>(kGranulePages) : 0;
  return WordFor(node, 0);
}

template <typename Leaves>
uint64_t PageMap<Leaves>::ExpandGranule(uint64_t word, uint64_t granule) {
  const uint64_t used = word != 0 ? kGranulePages : 0;
  const auto fill = [&](auto* leaf, uint64_t flags) {
    for (size_t i = 0; i < used; ++i) leaf->set(i, InRun(word, i, kGranulePages).word);
    return WithUsed(WordFor(leaf, flags), used);
  };
  const bool fits = word == 0 || (Leaf::Fits(InRun(word, kGranulePages - 1, kGranulePages).word) &&
                                  Leaf::Fits(word));
  Leaf* leaf = fits ? leaves_.take(granule) : nullptr;
  return leaf != nullptr ? fill(leaf, 0) : fill(spare_.take(), kWide);
}

template <typename Leaves>
uint64_t PageMap<Leaves>::Widen(uint64_t word, uint64_t granule) {
  Leaf* leaf = LeafOf(word);
  Node* node = spare_.take();
  for (size_t i = 0; i < kGranulePages; ++i) node->set(i, leaf->get(i));
  leaves_.put(granule, leaf, /*is_empty=*/false);
  return WithUsed(WordFor(node, kWide), UsedOf(word));
}

template <typename Leaves>
void PageMap<Leaves>::reclaim() {
  for (Node* node : retired_) spare_.put(node, /*is_empty=*/true);
  retired_.clear();
  leaves_.reclaim();
}

template class PageMap<FlatLeaves>;
template class PageMap<HeapLeaves<PackedPages>>;

}  // namespace mvgpu::dma
