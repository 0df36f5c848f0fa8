#include "dma-cache/page_map.h"

#include "apionly-domain/base/check.h"

namespace mvgpu::dma {

template <typename Leaf>
PageMap<Leaf>::PageMap() : near_(std::make_unique<std::atomic<uint64_t>[]>(kNearChunks)) {}

template <typename Leaf>
PageMap<Leaf>::~PageMap() {
  for (uint64_t chunk = 0; chunk < near_end_; ++chunk) {
    FreeChunk(near_[chunk].load(std::memory_order_relaxed));
  }
  for (const auto& [chunk, word] : far_) FreeChunk(word->load(std::memory_order_relaxed));
  reclaim();
}

template <typename Leaf>
void PageMap<Leaf>::FreeChunk(uint64_t word) {
  if ((word & kTable) == 0) return;
  Node* node = NodeOf(word);
  for (const auto& child : node->words) {
    const uint64_t leaf = child.load(std::memory_order_relaxed);
    if ((leaf & kTable) == 0) continue;
    if ((leaf & kWide) != 0) {
      delete NodeOf(leaf);
    } else {
      delete PackedOf(leaf);
    }
  }
  delete node;
}

// Where nothing is.
template <typename Leaf>
struct PageMap<Leaf>::Mapping {
  uint64_t operator()(uint64_t, uint64_t page) const {
    return (offset + page) << kPageShift | flags | (page == first ? kStart : 0);
  }
  uint64_t first;
  uint64_t offset;  // from page to target; wraps where targets lie below, and so does the sum
  uint64_t flags;
};

template <typename Leaf>
struct PageMap<Leaf>::Unmapping {
  uint64_t operator()(uint64_t, uint64_t) const { return 0; }
};

template <typename Leaf>
typename PageMap<Leaf>::Found PageMap<Leaf>::FindFar(uint64_t page) const {
  const auto it = far_.find(page >> kChunkShift);
  const uint64_t word = it == far_.end() ? 0 : it->second->load(std::memory_order_relaxed);
  return FindIn(word, page);
}

template <typename Leaf>
void PageMap<Leaf>::map(PageRun run, uint64_t target, uint64_t flags) {
  Update(run, /*create=*/true, Mapping{run.first, target - run.first, flags});
}

template <typename Leaf>
void PageMap<Leaf>::unmap(PageRun run) {
  Update(run, /*create=*/false, Unmapping{});
}

template <typename Leaf>
void PageMap<Leaf>::change_flags(PageRun run, uint64_t set, uint64_t clear) {
  Update(run, /*create=*/false,
         [=](uint64_t word, uint64_t) { return word == 0 ? 0 : (word & ~clear) | set; });
}

template <typename Leaf>
void PageMap<Leaf>::start_at(uint64_t page) {
  const Found found = find(page);
  if (found.word == 0 || (found.word & kStart) != 0) return;
  change_flags({page, 1}, kStart, 0);
}

template <typename Leaf>
template <typename Change>
void PageMap<Leaf>::Update(PageRun run, bool create, const Change& change) {
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

template <typename Leaf>
template <typename Change>
void PageMap<Leaf>::UpdateChunk(std::atomic<uint64_t>& slot, PageRun run, bool create,
                                const Change& change) {
  uint64_t word = slot.load(std::memory_order_relaxed);
  if (word == 0 && !create) return;
  if (run.count == kChunkPages && (word & kTable) == 0) {
    slot.store(change(word, run.first), std::memory_order_release);
    return;
  }
  if ((word & kTable) == 0) {
    word = ExpandChunk(word);
    slot.store(word, std::memory_order_release);
  }
  Node* node = NodeOf(word);
  for (uint64_t page = run.first; page < run.end();) {
    const uint64_t end = std::min(run.end(), (page | (kGranulePages - 1)) + 1);
    auto& child = node->words[page >> kGranuleShift & (kGranulePages - 1)];
    const bool was_used = child.load(std::memory_order_relaxed) != 0;
    UpdateGranule(child, {page, end - page}, create, change);
    const bool is_used = child.load(std::memory_order_relaxed) != 0;
    node->used += static_cast<uint32_t>(is_used) - static_cast<uint32_t>(was_used);
    page = end;
  }
  if (node->used != 0) return;
  slot.store(0, std::memory_order_release);
  retired_.push_back(word | kWide);
}

template <typename Leaf>
template <typename Change>
void PageMap<Leaf>::UpdateGranule(std::atomic<uint64_t>& slot, PageRun run, bool create,
                                  const Change& change) {
  uint64_t word = slot.load(std::memory_order_relaxed);
  if (word == 0 && !create) return;
  if (run.count == kGranulePages && (word & kTable) == 0) {
    slot.store(change(word, run.first), std::memory_order_release);
    return;
  }
  if ((word & kTable) == 0) {
    word = ExpandGranule(word);
    slot.store(word, std::memory_order_release);
  }
  if ((word & kWide) == 0 && !UpdateLeaf(PackedOf(word), &run, change)) {
    word = Widen(word);
    slot.store(word, std::memory_order_release);
  }
  if ((word & kWide) != 0) UpdateLeaf(NodeOf(word), &run, change);
  if (((word & kWide) != 0 ? NodeOf(word)->used : PackedOf(word)->used) != 0) return;
  slot.store(0, std::memory_order_release);
  retired_.push_back(word);
}

template <typename Leaf>
template <typename Entries, typename Change>
bool PageMap<Leaf>::UpdateLeaf(Entries* leaf, PageRun* run, const Change& change) {
  uint32_t used = leaf->used;
  uint64_t page = run->first;
  for (const uint64_t end = run->end(); page < end; ++page) {
    const size_t i = page & (kGranulePages - 1);
    const uint64_t old = leaf->get(i);
    const uint64_t word = change(old, page);
    if (word != 0 && !Entries::Fits(word)) break;
    leaf->set(i, word);
    used += static_cast<uint32_t>(word != 0) - static_cast<uint32_t>(old != 0);
  }
  leaf->used = used;
  *run = {page, run->end() - page};
  return run->count == 0;
}

// The same for what is done to many entries at a time: a run that is not aligned as its targets are
// fills leaves, in the reverse map above all (tests/bench, "miss, 2 MiB").
template <typename Leaf>
template <typename Entries>
bool PageMap<Leaf>::UpdateLeaf(Entries* leaf, PageRun* run, const Mapping& mapping) {
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
  leaf->used += static_cast<uint32_t>(run->count);
  return true;
}

template <typename Leaf>
template <typename Entries>
bool PageMap<Leaf>::UpdateLeaf(Entries* leaf, PageRun* run, const Unmapping&) {
  const size_t first = run->first & (kGranulePages - 1);
  uint32_t gone = 0;
  for (size_t i = first; i < first + run->count; ++i) {
    gone += leaf->get(i) != 0 ? 1 : 0;
    leaf->set(i, 0);
  }
  leaf->used -= gone;
  return true;
}

template <typename Leaf>
template <typename Any>
Any* PageMap<Leaf>::MakeNode(std::vector<std::unique_ptr<Any>>* spare) {
  if (spare->empty()) return new Any;
  Any* node = spare->back().release();
  spare->pop_back();
  return node;
}

template <typename Leaf>
uint64_t PageMap<Leaf>::ExpandChunk(uint64_t word) {
  Node* node = MakeNode(&spare_nodes_);
  for (size_t i = 0; word != 0 && i < kGranulePages; ++i) {
    node->set(i, InRun(word, i << kGranuleShift, kChunkPages).word);
  }
  node->used = word != 0 ? static_cast<uint32_t>(kGranulePages) : 0;
  return reinterpret_cast<uint64_t>(node) | kTable;
}

template <typename Leaf>
uint64_t PageMap<Leaf>::ExpandGranule(uint64_t word) {
  const auto fill = [word](auto* leaf) {
    for (size_t i = 0; word != 0 && i < kGranulePages; ++i) {
      leaf->set(i, InRun(word, i, kGranulePages).word);
    }
    leaf->used = word != 0 ? static_cast<uint32_t>(kGranulePages) : 0;
    return reinterpret_cast<uint64_t>(leaf) | kTable;
  };
  const bool fits = word == 0 || (Leaf::Fits(InRun(word, kGranulePages - 1, kGranulePages).word) &&
                                  Leaf::Fits(word));
  return fits ? fill(MakeNode(&spare_)) : fill(MakeNode(&spare_nodes_)) | kWide;
}

template <typename Leaf>
uint64_t PageMap<Leaf>::Widen(uint64_t word) {
  PackedNode* leaf = PackedOf(word);
  Node* node = MakeNode(&spare_nodes_);
  for (size_t i = 0; i < kGranulePages; ++i) node->set(i, leaf->get(i));
  node->used = leaf->used;
  retired_.push_back(word);
  return reinterpret_cast<uint64_t>(node) | kTable | kWide;
}

template <typename Leaf>
void PageMap<Leaf>::reclaim() {
  // A leaf that was widened is not empty.
  const auto keep = [](auto node, auto* spare) {
    if (node->used == 0 && spare->size() < kMostSpare) spare->push_back(std::move(node));
  };
  for (const uint64_t word : retired_) {
    if ((word & kWide) != 0) {
      keep(std::unique_ptr<Node>(NodeOf(word)), &spare_nodes_);
    } else {
      keep(std::unique_ptr<PackedNode>(PackedOf(word)), &spare_);
    }
  }
  retired_.clear();
}

template class PageMap<PackedTargets>;
template class PageMap<PackedPages>;

}  // namespace mvgpu::dma
