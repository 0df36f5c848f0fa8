#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "apionly-domain/base/address.h"
#include "apionly-domain/base/bits.h"
#include "apionly-domain/base/reserved_memory.h"

namespace mvgpu::dma {

// Pages that a user maps again and again: their device addresses, and the holds that came on top of
// those in the user's counters. A TLB that counts: a hit touches one word of 1 MiB, where an entry
// of the page table and a counter lie anywhere in many megabytes (tests/bench, "4096 hot pages").
//
//   word   [63:48] 1 + page / 2^17, or 0   [47:12] device address   [11:0] holds
//
// A page has one place. Neighbours lie side by side, and pages at the same place of several buffers
// do not meet: a page's lower bits say where it is, in an order that depends on the rest.
//
// A page may be here only while the user's counters say that it is held. So what is here does not
// decide which pages are held, and their device addresses stay. Whoever is about to change that
// takes the page out first.
//
// Who never maps a page twice gains nothing. So where most of a batch is not here, some of those
// behind it are not looked at, twice as many each time that happens, up to 63 in a row.
//
// Not thread-safe: guarded by the lock of its user.
class RecentHolds {
 public:
  // One more hold of each page that is here, and where the device sees it. Returns the others: bit
  // i for pages[i], of which there are at most 64.
  uint64_t add(std::span<const Iova> pages, std::span<DmaAddr> addresses);
  // One hold less of each page that has one here. Returns the others.
  uint64_t remove(std::span<const Iova> pages);

  // Whether add() looked at its last batch: pages that were not here then are worth a place.
  bool is_open() const { return is_open_; }
  // With one hold, in place of a page without. False, and nothing is changed: there is none, or a
  // number has too many bits.
  bool enter(uint64_t page, DmaAddr address);
  // Takes pages out. Calls visit(page, holds) for those that had holds here.
  template <typename Visit>
  void take(PageRun run, Visit visit) {
    if (memory_) Take(run, visit);
  }

 private:
  static constexpr unsigned kIndexBits = 17;
  static constexpr uint64_t kWords = uint64_t{1} << kIndexBits;
  static constexpr size_t kBytes = kWords * sizeof(uint64_t);
  static constexpr unsigned kTagShift = 48;
  static constexpr uint64_t kAddressMask = LowestBits(kTagShift) & ~kPageMask;
  static constexpr uint64_t kMostHolds = kPageMask;
  static constexpr uint32_t kLongestPause = 63;

  static constexpr uint64_t TagOf(uint64_t page) { return (page >> kIndexBits) + 1; }
  // From a page, or its lower bits, to its place, and from there to the lower bits.
  static constexpr uint64_t Mix(uint64_t low, uint64_t tag) {
    return (low ^ tag * 0x9e35) % kWords;
  }
  static constexpr bool IsOf(uint64_t word, uint64_t tag) { return word >> kTagShift == tag; }
  static constexpr uint64_t HoldsOf(uint64_t word) { return word & kMostHolds; }
  uint64_t* words() { return static_cast<uint64_t*>(memory_->data()); }
  uint64_t& WordOf(uint64_t page) { return words()[Mix(page, TagOf(page))]; }
  // Calls try_change(i, tag of pages[i], its word). Returns for which that was false.
  template <typename TryChange>
  uint64_t TryEach(std::span<const Iova> pages, TryChange try_change);
  void Pace(size_t hits, size_t pages);
  template <typename Visit>
  void Take(PageRun run, Visit& visit);

  std::optional<ReservedMemory> memory_;  // none until a page enters
  uint64_t holds_ = 0;                    // of all words
  uint32_t pause_ = 0;                    // batches not looked at, after the last one that was
  uint32_t to_skip_ = 0;                  // of them, still to come
  bool is_open_ = true;
};

inline uint64_t RecentHolds::add(std::span<const Iova> pages, std::span<DmaAddr> addresses) {
  is_open_ = to_skip_ == 0;
  if (!is_open_) --to_skip_;
  if (!is_open_ || !memory_) return LowestBits(pages.size());
  const uint64_t missed = TryEach(pages, [=](size_t i, uint64_t tag, uint64_t* place) {
    const uint64_t word = *place;
    addresses[i] = DmaAddr((word & kAddressMask) | pages[i].offset_in_page());
    if (!IsOf(word, tag) || HoldsOf(word) == kMostHolds) return false;
    *place = word + 1;
    return true;
  });
  const auto hits = pages.size() - static_cast<size_t>(std::popcount(missed));
  holds_ += hits;
  Pace(hits, pages.size());
  return missed;
}

inline uint64_t RecentHolds::remove(std::span<const Iova> pages) {
  if (holds_ == 0) return LowestBits(pages.size());
  const uint64_t missed = TryEach(pages, [](size_t, uint64_t tag, uint64_t* place) {
    const uint64_t word = *place;
    if (!IsOf(word, tag) || HoldsOf(word) == 0) return false;
    *place = word - 1;
    return true;
  });
  holds_ -= pages.size() - static_cast<size_t>(std::popcount(missed));
  return missed;
}

template <typename TryChange>
[[gnu::always_inline]] inline uint64_t RecentHolds::TryEach(std::span<const Iova> pages,
                                                            TryChange try_change) {
  uint64_t* const words = this->words();
  uint64_t missed = 0;
  for (size_t i = 0; i < pages.size(); ++i) {
    const uint64_t page = pages[i].page();
    const uint64_t tag = TagOf(page);
    if (!try_change(i, tag, &words[Mix(page, tag)])) [[unlikely]] {
      missed |= uint64_t{1} << i;
    }
  }
  return missed;
}

inline void RecentHolds::Pace(size_t hits, size_t pages) {
  pause_ = hits * 2 >= pages ? 0 : std::min(pause_ * 2 + 1, kLongestPause);
  to_skip_ = pause_;
}

inline bool RecentHolds::enter(uint64_t page, DmaAddr address) {
  const uint64_t tag = TagOf(page);
  const uint64_t target = BytesIn(address.page());
  if (tag >> (64 - kTagShift) != 0 || (target & ~kAddressMask) != 0) return false;
  if (!memory_) {
    memory_.emplace(kBytes);
    memory_->open(0, kBytes);
  }
  uint64_t& word = WordOf(page);
  if (HoldsOf(word) != 0) return false;
  word = tag << kTagShift | target | 1;
  ++holds_;
  return true;
}

template <typename Visit>
void RecentHolds::Take(PageRun run, Visit& visit) {
  const auto take = [&](uint64_t* word, uint64_t page) {
    const uint64_t holds = HoldsOf(*word);
    *word = 0;
    if (holds == 0) return;
    holds_ -= holds;
    visit(page, holds);
  };
  if (run.count < kWords) {
    for (uint64_t page = run.first; page < run.end(); ++page) {
      if (uint64_t& word = WordOf(page); IsOf(word, TagOf(page))) take(&word, page);
    }
    return;
  }
  for (uint64_t i = 0; i < kWords; ++i) {
    uint64_t& word = words()[i];
    const uint64_t tag = word >> kTagShift;
    if (tag == 0) continue;
    const uint64_t page = (tag - 1) << kIndexBits | Mix(i, tag);
    if (run.contains(page)) take(&word, page);
  }
}

}  // namespace mvgpu::dma
