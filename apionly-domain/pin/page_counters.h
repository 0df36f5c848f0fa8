#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include <absl/container/flat_hash_map.h>

#include "apionly-domain/base/address.h"
#include "apionly-domain/base/reserved_memory.h"

namespace mvgpu::domain {

// How often each page is held, in three forms, the smallest that fits:
//
//   2 bits   for every page of a chunk (1 GiB) in which something was held: 0, 1, 2, or "3 and so
//            many more"
//   a byte   how many more, in a second array of the chunk, that exists only where some page was
//            ever held 4 times, and that nobody looks at while none is
//   a table  for counts above 257, so that none overflows
//
// Most pages are held once, and a hit makes that two for a while, or three where a batch has a page
// twice. So what hits touch are 4 MiB for 64 GiB of RAM, which the caches and TLBs of a processor
// hold, where 8-byte counters would be 128; and neighbours are counted 32 at a time (tests/bench,
// "pin + release").
//
// The 2 bits of all pages below 16 TiB are one array of 1 GiB of addresses: where a page is counted
// is its number and a shift away, without a look at what is there. It has memory only where
// something was held. The rest of it reads as zero, "not held", so a hit needs no other check, and
// may not be written.
//
// Not thread-safe; Near::prefetch() may be called at any time.
class PageCounters {
 public:
  static constexpr unsigned kChunkShift = 18;  // 1 GiB
  static constexpr uint64_t kChunkPages = uint64_t{1} << kChunkShift;
  static constexpr uint64_t kNearPages = uint64_t{1} << 32;  // 16 TiB

  PageCounters();
  ~PageCounters();
  PageCounters(const PageCounters&) = delete;
  PageCounters& operator=(const PageCounters&) = delete;

  // One more for every page of the run, if each is held exactly once; otherwise false, and nothing
  // is changed.
  bool try_add(PageRun run) { return TryFlipOverChunks(run, kOnes); }
  // One less for every page of the run, if each is held exactly twice; otherwise false, and nothing
  // is changed.
  bool try_remove(PageRun run) { return TryFlipOverChunks(run, kTwos); }

  // One more and one less for one page, if that changes nothing about which pages are held: it is
  // held before, and afterwards. False, and nothing is changed, otherwise.
  bool try_add_one(uint64_t page);
  bool try_remove_one(uint64_t page);
  // The same where it changes that: from not held to held once, and back. The latter also fails for
  // pages from kNearPages on.
  bool try_add_first(uint64_t page);
  bool try_remove_last(uint64_t page);

  void add(PageRun run);
  // Appends the pages of the run that are held no longer, in runs. REQUIRES: all of them are held.
  void remove(PageRun run, std::vector<PageRun>* freed);
  // The page is not held any more; returns how often it was.
  uint64_t forget(uint64_t page);

  // Whether every page of the run is held, and whether each is held at least twice.
  bool all_held(PageRun run) const;
  bool all_held_twice(PageRun run) const;
  uint64_t count(uint64_t page) const;
  bool holds(uint64_t page) const {
    const uint64_t* word = Find(page);
    return word != nullptr && IsHeld(word, page);
  }
  // Calls visit(PageRun) for each stretch of held pages in the run, in order.
  template <typename Visit>
  void for_each_held(PageRun run, Visit visit) const;
  bool any(PageRun run) const;

  // The pages below kNearPages: a pointer that the compiler can keep in a register, and functions
  // that call nothing. A page above stands for another one: prefetch() does no harm then, the rest
  // must not be asked.
  class Near {
   public:
    explicit Near(const PageCounters& counters) : words_(counters.near_words_) {}
    static constexpr bool has(PageRun run) { return run.end() <= kNearPages; }
    [[gnu::always_inline]] void prefetch(uint64_t page) const {
      __builtin_prefetch(word_of(page), /*rw=*/1);
    }
    bool try_add(PageRun run) const { return TryFlip(word_of(run.first), run, kOnes); }
    bool try_remove(PageRun run) const { return TryFlip(word_of(run.first), run, kTwos); }
    // For loops over single pages: the word with a page's two bits.
    uint64_t* word_of(uint64_t page) const { return words_ + page % kNearPages / kPagesPerWord; }
    // From 1 to 2, and from 2 to 1; false, and nothing is changed, when the count is another.
    static bool TryAddOne(uint64_t* word, uint64_t page) { return TryFlipOne(word, page, kOnes); }
    static bool TryRemoveOne(uint64_t* word, uint64_t page) {
      return TryFlipOne(word, page, kTwos);
    }
    static bool IsHeldOnce(const uint64_t* word, uint64_t page) {
      return (*word >> ShiftOf(page) & kMore) == 1;
    }

   private:
    uint64_t* words_;
  };

  static bool IsHeld(const uint64_t* word, uint64_t page) {
    return (*word >> ShiftOf(page) & kMore) != 0;
  }

  uint64_t held_pages() const { return held_pages_; }
  // Gives back arrays that lie wholly in the run and count nothing.
  void trim(PageRun run);

 private:
  friend class PageCountersPeer;  // of the tests

  static constexpr uint64_t kChunkMask = kChunkPages - 1;
  static constexpr uint64_t kNearChunks = kNearPages / kChunkPages;
  static constexpr uint64_t kPagesPerWord = 32;
  static constexpr uint64_t kOnes = 0x5555'5555'5555'5555;  // every page of a word held once
  static constexpr uint64_t kTwos = kOnes << 1;
  static constexpr uint64_t kMore = 3;          // and what the byte says,
  static constexpr uint8_t kLargestByte = 254;  // or, when that is 255, what more_ says instead
  static constexpr size_t kWordBytes = kChunkPages / kPagesPerWord * sizeof(uint64_t);
  static constexpr size_t kNearBytes = kNearPages / kPagesPerWord * sizeof(uint64_t);

  struct Chunk {
    uint64_t* words = nullptr;  // 2 bits per page, writable; null where nothing was ever held
    uint8_t* bytes = nullptr;   // one per page, 0 where the 2 bits are not kMore
    uint64_t held = 0;          // pages
    uint64_t many = 0;          // pages with a byte that is not 0
  };

  static constexpr unsigned ShiftOf(uint64_t page) {
    return static_cast<unsigned>(page * 2 % 64);  // a shift does this by itself
  }
  // The bits of the pages [first, end) of one word, first < kPagesPerWord.
  static constexpr uint64_t MaskOf(uint64_t first, uint64_t end) {
    const uint64_t below_end = end >= kPagesPerWord ? ~uint64_t{0} : (uint64_t{1} << end * 2) - 1;
    return below_end & ~uint64_t{0} << first * 2;
  }
  // Null for a page above kNearPages where nothing was ever held.
  const uint64_t* Find(uint64_t page) const {
    if (page < kNearPages) [[likely]] {
      return near_words_ + page / kPagesPerWord;
    }
    return FindFar(page);
  }
  const uint64_t* FindFar(uint64_t page) const;
  template <typename Visit>
  void ForEachHeldInChunk(PageRun run, PageRun* stretch, Visit& visit) const;
  // Turns 1 into 2 and 2 into 1, if the count is as `expected` says.
  static bool TryFlipOne(uint64_t* word, uint64_t page, uint64_t expected) {
    const uint64_t bits = kMore << ShiftOf(page);
    if (((*word ^ expected) & bits) != 0) return false;
    *word ^= bits;
    return true;
  }
  // The same for every page, if all are as `expected` says. REQUIRES: `words` begins with the word
  // of run.first.
  static bool TryFlip(uint64_t* words, PageRun run, uint64_t expected);
  bool TryFlipOverChunks(PageRun run, uint64_t expected);
  // Whether wanted(word, mask of the run's pages) says so for each word of the run.
  template <typename Wanted>
  bool AllWords(PageRun run, Wanted wanted) const;

  // Null where there is none.
  Chunk* FindChunk(uint64_t index) {
    return const_cast<Chunk*>(std::as_const(*this).FindChunk(index));
  }
  const Chunk* FindChunk(uint64_t index) const;
  Chunk* GetChunk(uint64_t index) {
    if (index < near_.size() && near_[index].words != nullptr) [[likely]] {
      return &near_[index];
    }
    return OpenChunk(index);
  }
  Chunk* OpenChunk(uint64_t index);
  void AddInChunk(Chunk* chunk, PageRun run);
  void RemoveInChunk(Chunk* chunk, PageRun run, std::vector<PageRun>* freed);
  void AddOne(Chunk* chunk, uint64_t page);
  // True when the page is held no longer.
  bool RemoveOne(Chunk* chunk, uint64_t page);
  // One more or less for a page that is held 3 times or more. True when it is held twice then,
  // which the 2 bits do not say yet.
  void AddToMany(Chunk* chunk, uint64_t page);
  bool RemoveFromMany(Chunk* chunk, uint64_t page);
  void Free(uint64_t index, Chunk* chunk);
  // The chunks with held pages that the run touches, in order.
  std::vector<uint64_t> HeldChunks(PageRun run) const;

  ReservedMemory near_memory_;                // open where a chunk has words
  uint64_t* const near_words_;                // of kNearPages; in it
  std::vector<Chunk> near_;                   // by chunk; as long as the highest one in use needs
  absl::flat_hash_map<uint64_t, Chunk> far_;  // chunks from kNearChunks on
  absl::flat_hash_map<uint64_t, uint64_t> more_;  // counts above kMore + kLargestByte, by page
  uint64_t held_pages_ = 0;
};

inline bool PageCounters::TryFlip(uint64_t* words, PageRun run, uint64_t expected) {
  const uint64_t last_page = run.first % kPagesPerWord + run.count - 1;  // from words[0] on
  const uint64_t last = last_page / kPagesPerWord;
  uint64_t head = ~uint64_t{0} << ShiftOf(run.first);
  const uint64_t tail = ~uint64_t{0} >> (62 - ShiftOf(last_page));
  if (last == 0) {
    head &= tail;
    if (((words[0] ^ expected) & head) != 0) return false;
    words[0] ^= head;
    return true;
  }
  uint64_t other = ((words[0] ^ expected) & head) | ((words[last] ^ expected) & tail);
  for (uint64_t i = 1; i < last; ++i) other |= words[i] ^ expected;
  if (other != 0) return false;
  words[0] ^= head;
  for (uint64_t i = 1; i < last; ++i) words[i] = ~words[i];
  words[last] ^= tail;
  return true;
}

inline bool PageCounters::try_add_first(uint64_t page) {
  Chunk* chunk = GetChunk(page >> kChunkShift);
  uint64_t& word = chunk->words[(page & kChunkMask) / kPagesPerWord];
  if ((word >> ShiftOf(page) & kMore) != 0) return false;
  word |= uint64_t{1} << ShiftOf(page);
  ++chunk->held;
  ++held_pages_;
  return true;
}

inline bool PageCounters::try_remove_last(uint64_t page) {
  const uint64_t index = page >> kChunkShift;
  if (index >= near_.size() || near_[index].words == nullptr) return false;
  uint64_t& word = near_[index].words[(page & kChunkMask) / kPagesPerWord];
  if ((word >> ShiftOf(page) & kMore) != 1) return false;
  word ^= uint64_t{1} << ShiftOf(page);
  --near_[index].held;
  --held_pages_;
  return true;
}

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
  const uint64_t* word = Find(run.first);
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
