#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "apionly-domain/base/address.h"

namespace mvgpu::dma {

// What the entries of a PageMap's leaves are packed into, and where leaves are.

struct PageMapFlags {
  static constexpr uint64_t kTable = 1;  // of words: a node, not a run
  static constexpr uint64_t kWide = 2;   // of words with kTable: a leaf of whole words
  static constexpr uint64_t kFlat = 4;   // of a chunk's with kTable: no granule is a run or wide

  static constexpr uint64_t kRead = 16;  // flags of runs
  static constexpr uint64_t kWrite = 32;
  static constexpr uint64_t kGoing = 64;         // about to be revoked: no new holds
  static constexpr uint64_t kStart = 128;        // a piece of the mapper's begins here
  static constexpr uint64_t kPinnedRead = 256;   // pinned for reading,
  static constexpr uint64_t kPinnedWrite = 512;  // for writing,
  static constexpr uint64_t kReadAsRuns = 1024;  // in pins that the domain counts as runs
  static constexpr uint64_t kWriteAsRuns = 2048;
  static constexpr uint64_t kAllFlags = 0xff0;
};

inline constexpr size_t kLeafEntries = 512;

// 40 bits of page (52-bit addresses) and all flags in 6 bytes, ten to a cache line: an entry across
// two of them would be waited for twice.
struct alignas(64) PackedTargets {
  // The first of three parts of a word without its lowest four bits, which are those of nodes.
  using Entry = std::atomic<uint16_t>;

  static constexpr bool Fits(uint64_t word) { return word >> 52 == 0; }
  // Relaxed, both: see PageMap.
  static uint64_t Load(const Entry* entry) {
    return uint64_t{entry[0].load(std::memory_order_relaxed)} << 4 |
           uint64_t{entry[1].load(std::memory_order_relaxed)} << 20 |
           uint64_t{entry[2].load(std::memory_order_relaxed)} << 36;
  }
  static void Store(Entry* entry, uint64_t word) {
    entry[0].store(static_cast<uint16_t>(word >> 4), std::memory_order_relaxed);
    entry[1].store(static_cast<uint16_t>(word >> 20), std::memory_order_relaxed);
    entry[2].store(static_cast<uint16_t>(word >> 36), std::memory_order_relaxed);
  }
  Entry* at(size_t i) { return &parts[PlaceOf(i)]; }
  const Entry* at(size_t i) const { return &parts[PlaceOf(i)]; }
  uint64_t get(size_t i) const { return Load(at(i)); }
  void set(size_t i, uint64_t word) { Store(at(i), word); }

  static constexpr size_t kPerLine = 10;
  static constexpr size_t kPartsPerLine = 64 / sizeof(Entry);
  // Of the entry's first part. The division as the processor does it best, exact below 2^14.
  static constexpr size_t PlaceOf(size_t i) {
    return 3 * i + (kPartsPerLine - 3 * kPerLine) * (i * 6554 >> 16);
  }
  std::array<Entry, (kLeafEntries + kPerLine - 1) / kPerLine * kPartsPerLine> parts;
};

// Pages below 2^32 - 1 with the flag kRead in 4 bytes; where pieces begin is forgotten. Plain
// numbers, which the compiler fills and clears four at a time: for maps that nobody reads without
// the writer's lock.
struct PackedPages {
  using Entry = uint32_t;

  static constexpr bool Fits(uint64_t word) {
    constexpr uint64_t kOthers = PageMapFlags::kAllFlags & ~PageMapFlags::kStart;
    return word >> kPageShift < UINT32_MAX && (word & kOthers) == PageMapFlags::kRead;
  }
  static uint64_t Load(const Entry* entry) {
    return *entry == 0 ? 0 : uint64_t{*entry - 1} << kPageShift | PageMapFlags::kRead;
  }
  static void Store(Entry* entry, uint64_t word) {
    // 0 for nothing, otherwise one more than the page: what is there has kRead.
    const uint64_t one = (word & PageMapFlags::kRead) / PageMapFlags::kRead;
    *entry = static_cast<Entry>((word >> kPageShift) + one);
  }
  Entry* at(size_t i) { return &entries[i]; }
  uint64_t get(size_t i) const { return Load(&entries[i]); }
  void set(size_t i, uint64_t word) { Store(&entries[i], word); }

  std::array<Entry, kLeafEntries> entries{};
};

// A few nodes that nothing is in, kept for the next: who maps and unmaps single pages would make
// one each time.
template <typename Node>
class SpareNodes {
 public:
  // REQUIRES: whoever gets it has what take() gave, and gives it to put() or deletes it.
  Node* take() {
    if (spare_.empty()) return new Node;
    Node* node = spare_.back().release();
    spare_.pop_back();
    return node;
  }
  void put(Node* node, bool is_empty) {
    std::unique_ptr<Node> owned(node);
    if (is_empty && spare_.size() < kMost) spare_.push_back(std::move(owned));
  }

 private:
  static constexpr size_t kMost = 64;
  std::vector<std::unique_ptr<Node>> spare_;
};

// Leaves on the heap, for maps that nobody reads without the writer's lock. FlatLeaves is the other
// one; what the functions mean is said there.
template <typename Packed>
class HeapLeaves {
 public:
  struct alignas(64) Leaf : Packed {};

  Leaf* take(uint64_t) { return spare_.take(); }
  void put(uint64_t, Leaf* leaf, bool is_empty) { spare_.put(leaf, is_empty); }
  void discard(Leaf* leaf) { delete leaf; }
  bool has_left() const { return false; }
  void reclaim() {}
  void pass(uint64_t) {}
  void prefetch(uint64_t) const {}
  uint64_t groups() const { return 0; }

 private:
  SpareNodes<Leaf> spare_;
};

}  // namespace mvgpu::dma
