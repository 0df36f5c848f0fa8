#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>

#include "apionly-domain/base/address.h"

namespace mvgpu::domain {

// A bit for each of 512 pages, of which runs are set, cleared and found: only the words that a run
// touches are looked at, where std::bitset goes over all of them. REQUIRES everywhere: the pages of
// a run are below kPages.
class PageBits {
 public:
  static constexpr uint64_t kPages = 512;

  bool test(uint64_t page) const { return (words_[page / kWordBits] >> page % kWordBits & 1) != 0; }
  void set(PageRun run) {
    ForEachWord(run, [](uint64_t& word, uint64_t mask) { word |= mask; });
  }
  void clear(PageRun run) {
    ForEachWord(run, [](uint64_t& word, uint64_t mask) { word &= ~mask; });
  }
  void assign(PageRun run, bool value) { value ? set(run) : clear(run); }

  // The first page in [from, end) whose bit is `value`; `end` when there is none.
  uint64_t find(uint64_t from, uint64_t end, bool value) const {
    while (from < end) {
      const uint64_t word = words_[from / kWordBits] ^ (value ? 0 : ~uint64_t{0});
      const uint64_t rest = word >> from % kWordBits;
      if (rest != 0) return std::min(end, from + static_cast<uint64_t>(std::countr_zero(rest)));
      from = (from / kWordBits + 1) * kWordBits;
    }
    return end;
  }
  bool none() const { return find(0, kPages, true) == kPages; }
  // Calls visit(PageRun) for each stretch of set bits in the run, in order; it may clear them.
  template <typename Visit>
  void for_each_run(PageRun within, Visit visit) const {
    for (uint64_t first = find(within.first, within.end(), true); first < within.end();) {
      const uint64_t end = find(first, within.end(), false);
      visit(PageRun{first, end - first});
      first = find(end, within.end(), true);
    }
  }

 private:
  static constexpr uint64_t kWordBits = 64;

  template <typename Change>
  void ForEachWord(PageRun run, Change change) {
    for (uint64_t page = run.first; page < run.end();) {
      const uint64_t in_word = page % kWordBits;
      const uint64_t count = std::min(run.end() - page, kWordBits - in_word);
      change(words_[page / kWordBits], ~uint64_t{0} >> (kWordBits - count) << in_word);
      page += count;
    }
  }

  std::array<uint64_t, kPages / kWordBits> words_{};
};

}  // namespace mvgpu::domain
