#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

#include <absl/container/flat_hash_map.h>

#include "apionly-domain/base/address.h"

namespace mvgpu::domain {

// How often each page is held, in three forms, the smallest that fits:
//
//   2 bits   for every page of a chunk (1 GiB) in which something was held: 0, 1, 2, or "more"
//   a byte   in a second array of the chunk, that exists only where some page is held 3 times
//   a table  for counts above 254, so that none overflows
//
// Most pages are held once, and a hit makes that two for a while. So what hits touch are 4 MiB for
// 64 GiB of RAM, which the caches and TLBs of a processor hold, where 8-byte counters would be 128;
// and neighbours are counted 32 at a time (tests/bench, "pin + release").
//
// Not thread-safe.
class PageCounters {
 public:
  static constexpr unsigned kChunkShift = 18;  // 1 GiB
  static constexpr uint64_t kChunkPages = uint64_t{1} << kChunkShift;

  PageCounters() = default;
  ~PageCounters();
  PageCounters(const PageCounters&) = delete;
  PageCounters& operator=(const PageCounters&) = delete;

  // One more for every page of the run, if each is held exactly once; otherwise false, and nothing
  // is changed.
  bool try_add(PageRun run) { return TryFlip(run, kOnes); }
  // One less for every page of the run, if each is held exactly twice; otherwise false, and nothing
  // is changed.
  bool try_remove(PageRun run) { return TryFlip(run, kTwos); }

  void add(PageRun run);
  // Appends the pages of the run that are held no longer, in runs. REQUIRES: all of them are held.
  void remove(PageRun run, std::vector<PageRun>* freed);

  // Whether every page of the run is held, and whether each is held at least twice.
  bool all_held(PageRun run) const;
  bool all_held_twice(PageRun run) const;
  uint64_t count(uint64_t page) const;
  bool holds(uint64_t page) const {
    const uint64_t* word = find(page);
    return word != nullptr && (*word >> ShiftOf(page) & kMore) != 0;
  }
  // Calls visit(PageRun) for each stretch of held pages in the run, in order.
  template <typename Visit>
  void for_each_held(PageRun run, Visit visit) const;
  bool any(PageRun run) const;

  // For loops over single pages: the word with a page's two bits; null where nothing was ever held.
  uint64_t* find(uint64_t page) {
    uint64_t* words = FindChunk(page >> kChunkShift)->words;
    return words == nullptr ? nullptr : words + ((page & kChunkMask) / kPagesPerWord);
  }
  const uint64_t* find(uint64_t page) const { return const_cast<PageCounters*>(this)->find(page); }
  // The same for pages below 16 TiB; null for others. Calls nothing.
  uint64_t* find_near(uint64_t page) {
    const uint64_t index = page >> kChunkShift;
    if (index >= near_.size() || near_[index].words == nullptr) return nullptr;
    return near_[index].words + ((page & kChunkMask) / kPagesPerWord);
  }
  // From 1 to 2, and from 2 to 1; false, and nothing is changed, when the count is another.
  static bool TryAddOne(uint64_t* word, uint64_t page) {
    const unsigned shift = ShiftOf(page);
    if ((*word >> shift & kMore) != 1) return false;
    *word ^= kMore << shift;
    return true;
  }
  static bool TryRemoveOne(uint64_t* word, uint64_t page) {
    const unsigned shift = ShiftOf(page);
    if ((*word >> shift & kMore) != 2) return false;
    *word ^= kMore << shift;
    return true;
  }

  uint64_t held_pages() const { return held_pages_; }
  // Gives back arrays that lie wholly in the run and count nothing.
  void trim(PageRun run);

 private:
  static constexpr uint64_t kChunkMask = kChunkPages - 1;
  static constexpr uint64_t kNearChunks = uint64_t{1} << 14;
  static constexpr uint64_t kPagesPerWord = 32;
  static constexpr uint64_t kOnes = 0x5555'5555'5555'5555;  // every page of a word held once
  static constexpr uint64_t kTwos = kOnes << 1;
  static constexpr uint64_t kMore = 3;          // the count is in the byte,
  static constexpr uint8_t kLargestByte = 254;  // or, when that is 255, in more_
  static constexpr size_t kWordBytes = kChunkPages / kPagesPerWord * sizeof(uint64_t);

  struct alignas(32) Chunk {
    uint64_t* words = nullptr;  // 2 bits per page: the kernel's zero pages until they are written
    uint8_t* bytes = nullptr;   // one per page, valid where the 2 bits are kMore
    uint64_t held = 0;          // pages
  };

  static constexpr unsigned ShiftOf(uint64_t page) {
    return static_cast<unsigned>(page % kPagesPerWord) * 2;
  }
  // The bits of the pages [first, end) of one word, first < kPagesPerWord.
  static constexpr uint64_t MaskOf(uint64_t first, uint64_t end) {
    const uint64_t below_end = end >= kPagesPerWord ? ~uint64_t{0} : (uint64_t{1} << end * 2) - 1;
    return below_end & ~uint64_t{0} << first * 2;
  }
  template <typename Visit>
  void ForEachHeldInChunk(PageRun run, PageRun* stretch, Visit& visit) const;
  // Turns 1 into 2 and 2 into 1 for every page, if all are as `expected` says.
  bool TryFlip(PageRun run, uint64_t expected);
  bool TryFlipOverChunks(PageRun run, uint64_t expected);
  // Calls visit(uint64_t& word, mask of the run's pages) for each word of the run, until it says
  // false; returns the page where, or run.end(). Stops where there is no word.
  template <typename Visit>
  uint64_t ForEachWord(PageRun run, Visit visit);

  // An empty one where there is none. The pointer holds until the next chunk is made.
  Chunk* FindChunk(uint64_t index) {
    if (index < near_.size()) [[likely]] {
      return &near_[index];
    }
    return FindFarChunk(index);
  }
  Chunk* FindFarChunk(uint64_t index);
  Chunk* GetChunk(uint64_t index);
  void AddOne(Chunk* chunk, uint64_t page);
  // True when the page is held no longer.
  bool RemoveOne(Chunk* chunk, uint64_t page);
  // One more or less for a page that is held 3 times or more. True when it is held twice then.
  void AddToMany(Chunk* chunk, uint64_t page);
  bool RemoveFromMany(Chunk* chunk, uint64_t page);
  static void Free(Chunk* chunk);
  // The chunks with held pages that the run touches, in order.
  std::vector<uint64_t> HeldChunks(PageRun run) const;

  std::vector<Chunk> near_;                   // by chunk; as long as the highest one in use needs
  absl::flat_hash_map<uint64_t, Chunk> far_;  // chunks from kNearChunks on
  absl::flat_hash_map<uint64_t, uint64_t> more_;  // counts above kLargestByte, by page
  uint64_t held_pages_ = 0;
};

template <typename Visit>
void PageCounters::for_each_held(PageRun run, Visit visit) const {
  if (held_pages_ == 0 || run.count == 0) return;
  PageRun stretch;
  const uint64_t first_chunk = run.first >> kChunkShift;
  if (first_chunk == (run.end() - 1) >> kChunkShift) {
    ForEachHeldInChunk(run, &stretch, visit);
  } else {
    for (const uint64_t index : HeldChunks(run)) {
      const uint64_t first = std::max(run.first, index << kChunkShift);
      const uint64_t end = std::min(run.end(), (index + 1) << kChunkShift);
      ForEachHeldInChunk({first, end - first}, &stretch, visit);
    }
  }
  if (stretch.count != 0) visit(stretch);
}

// `*stretch` goes on from chunk to chunk.
template <typename Visit>
void PageCounters::ForEachHeldInChunk(PageRun run, PageRun* stretch, Visit& visit) const {
  const uint64_t* word = find(run.first);
  if (word == nullptr) return;
  for (uint64_t page = run.first; page < run.end(); ++word) {
    const uint64_t in_word = page % kPagesPerWord;
    const uint64_t word_first = page - in_word;
    uint64_t held = (*word | *word >> 1) & kOnes & MaskOf(in_word, run.end() - word_first);
    for (; held != 0; held &= held - 1) {
      const uint64_t one = word_first + static_cast<uint64_t>(std::countr_zero(held)) / 2;
      if (stretch->count != 0 && stretch->end() == one) {
        ++stretch->count;
        continue;
      }
      if (stretch->count != 0) visit(*stretch);
      *stretch = {one, 1};
    }
    page = word_first + kPagesPerWord;
  }
}

}  // namespace mvgpu::domain
