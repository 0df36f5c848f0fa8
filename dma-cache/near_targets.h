#pragma once

#include <atomic>
#include <cstdint>

#include "dma-cache/page_map.h"

namespace mvgpu::dma {

// PageMap::find_near() for loops, in two steps: pointers that the compiler can keep in registers,
// and functions that call nothing. Runs beside the writer, as find_near() may.
class NearTargets : private PageMapFlags {
 public:
  using Table = PageMap<FlatLeaves>;

  explicit NearTargets(const Table& map)
      : chunks_(map.near_.get()), leaves_(map.leaves_.leaves()) {}

  // The page's word, but where the page has an entry of its own: that, on its way into the
  // processor's cache. What lies between, the granules' words, is looked at only where some granule
  // of the chunk is a run.
  uint64_t look_up(uint64_t page) const {
    const uint64_t chunk = page >> Table::kChunkShift;
    if (chunk >= Table::kNearChunks) return 0;
    const uint64_t word = chunks_[chunk].load(std::memory_order_acquire);
    if ((word & kTable) == 0) return word + ((page % Table::kChunkPages) << kPageShift);
    if ((word & kFlat) == 0) return LookUpInGranule(word, page);
    return AskFor(page);
  }
  // The page's word, from what look_up() said. Without kRead or kWrite: nothing, whatever else it
  // says. kStart means nothing.
  static uint64_t WordOf(uint64_t looked_up) {
    if ((looked_up & kTable) == 0) return looked_up;
    return FlatLeaves::Leaf::Load(
        reinterpret_cast<const FlatLeaves::Leaf::Entry*>(looked_up & ~kTable));
  }

 private:
  // Into the second-level cache: the first one can wait for so few lines at a time that a batch
  // would take half as long again (tests/bench, "scattered device addresses").
  uint64_t AskFor(uint64_t page) const {
    const auto* entry = leaves_[page / Table::kGranulePages].at(page % Table::kGranulePages);
    __builtin_prefetch(entry, /*rw=*/0, /*locality=*/2);
    static_assert(alignof(FlatLeaves::Leaf::Entry) > kTable);
    return reinterpret_cast<uint64_t>(entry) | kTable;
  }
  uint64_t LookUpInGranule(uint64_t word, uint64_t page) const {
    const size_t i = page % Table::kGranulePages;
    word = Table::NodeOf(word)->words[(page >> Table::kGranuleShift) % Table::kGranulePages].load(
        std::memory_order_acquire);
    if ((word & kTable) == 0) return word + (i << kPageShift);
    return (word & kWide) != 0 ? Table::NodeOf(word)->get(i) : AskFor(page);
  }

  const std::atomic<uint64_t>* const chunks_;
  const FlatLeaves::Leaf* const leaves_;
};

}  // namespace mvgpu::dma
