#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include <absl/container/flat_hash_map.h>

#include "apionly-domain/base/address.h"

namespace mvgpu::domain {

// How often each page is held: one byte per page, in arrays of 1 GiB of pages that exist only where
// something was held. A count that a byte cannot hold goes on in a table beside, so none overflows.
//
// The bytes are plain memory: 16 MiB for 64 GiB of RAM instead of the 128 MiB of 8-byte atomics,
// and counting neighbours is a vector instruction (tests/bench, "pin + release").
//
// Not thread-safe.
class PageCounters {
 public:
  PageCounters() = default;
  ~PageCounters();
  PageCounters(const PageCounters&) = delete;
  PageCounters& operator=(const PageCounters&) = delete;

  // One more for every page of the run, if every one is held already and its byte has room;
  // otherwise false, and nothing is changed.
  bool try_add(PageRun run);
  // One less for every page of the run, if each is held after that; otherwise false, and nothing is
  // changed.
  bool try_remove(PageRun run);

  void add(PageRun run);
  // Appends the pages of the run that are held no longer, in runs. REQUIRES: all of them are held.
  void remove(PageRun run, std::vector<PageRun>* freed);

  uint64_t count(uint64_t page) const;
  bool holds(uint64_t page) const {
    const uint8_t* byte = find(page);
    return byte != nullptr && *byte != 0;
  }
  // Calls visit(PageRun) for each stretch of held pages in the run, in order.
  template <typename Visit>
  void for_each_held(PageRun run, Visit visit) const;
  bool any(PageRun run) const;

  // The byte of a page, for loops over single pages; null where nothing was ever held. It may be
  // counted up in place where it has room, and down where the page stays held.
  static constexpr uint8_t kFewest = 1;
  static constexpr uint8_t kMost = 254;
  static constexpr bool HasRoom(uint8_t byte) { return byte >= kFewest && byte < kMost; }
  static constexpr bool StaysHeld(uint8_t byte) { return byte > kFewest && byte <= kMost; }
  uint8_t* find(uint64_t page) {
    uint8_t* bytes = FindChunk(page >> kChunkShift)->bytes;
    return bytes == nullptr ? nullptr : bytes + (page & kChunkMask);
  }
  const uint8_t* find(uint64_t page) const { return const_cast<PageCounters*>(this)->find(page); }

  uint64_t held_pages() const { return held_pages_; }
  // Gives back arrays that lie wholly in the run and count nothing.
  void trim(PageRun run);

  static constexpr unsigned kChunkShift = 18;  // 1 GiB
  static constexpr uint64_t kChunkPages = uint64_t{1} << kChunkShift;

 private:
  static constexpr uint64_t kChunkMask = kChunkPages - 1;
  static constexpr uint64_t kNearChunks = uint64_t{1} << 14;
  static constexpr uint8_t kOverflowed = 255;  // the count is in overflow_

  struct Chunk {
    uint8_t* bytes = nullptr;  // one per page: the kernel's zero pages until they are written
    uint64_t held = 0;         // bytes that are not 0
  };

  // An empty one where there is none. The pointer holds until the next chunk is made.
  Chunk* FindChunk(uint64_t index) {
    if (index < near_.size()) [[likely]] {
      return &near_[index];
    }
    return FindFarChunk(index);
  }
  Chunk* FindFarChunk(uint64_t index);
  Chunk* GetChunk(uint64_t index);
  bool TryAddToAll(PageRun run, uint8_t value, uint8_t first, uint8_t last);
  void AddOne(Chunk* chunk, uint64_t page);
  // True when the page is held no longer.
  bool RemoveOne(Chunk* chunk, uint64_t page);
  // The chunks with held pages that the run touches, in order.
  std::vector<uint64_t> HeldChunks(PageRun run) const;

  std::vector<Chunk> near_;                   // by chunk; as long as the highest one in use needs
  absl::flat_hash_map<uint64_t, Chunk> far_;  // chunks from kNearChunks on
  absl::flat_hash_map<uint64_t, uint64_t> overflow_;  // counts above kMost, by page
  uint64_t held_pages_ = 0;
};

template <typename Visit>
void PageCounters::for_each_held(PageRun run, Visit visit) const {
  if (held_pages_ == 0) return;
  PageRun stretch;
  for (const uint64_t index : HeldChunks(run)) {
    const uint64_t first = std::max(run.first, index << kChunkShift);
    const uint64_t end = std::min(run.end(), (index + 1) << kChunkShift);
    const uint8_t* byte = find(first);
    for (uint64_t page = first; page < end; ++page, ++byte) {
      if (*byte == 0) continue;
      if (stretch.count != 0 && stretch.end() == page) {
        ++stretch.count;
        continue;
      }
      if (stretch.count != 0) visit(stretch);
      stretch = {page, 1};
    }
  }
  if (stretch.count != 0) visit(stretch);
}

}  // namespace mvgpu::domain
