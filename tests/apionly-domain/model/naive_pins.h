#pragma once

// Who holds which pages of one domain, and which of them were written: maps of pages to counts.

#include <array>
#include <cstdint>
#include <map>
#include <set>
#include <vector>

#include "tests/apionly-domain/model/naive_memory.h"

namespace mvgpu::domain::model {

inline constexpr uint32_t kContexts = 3;

// How a page came to be held: that decides what may let go of it.
enum class How : uint8_t {
  kHandle,       // of at most 512 pages
  kLargeHandle,  // of more
  kLoose,        // by pin_pages()
};

class NaivePins {
 public:
  using Counts = std::map<uint64_t, uint64_t>;  // IOVA page -> how often; never 0

  void add(uint32_t context, bool for_write, How how, uint64_t page, Backing backing) {
    ++counts(context, for_write, how)[page];
    ++backing_[backing];
    ++pinned_;
  }
  void remove(uint32_t context, bool for_write, How how, uint64_t page, Backing backing) {
    Drop(counts(context, for_write, how), page);
    Drop(backing_, backing);
    --pinned_;
  }

  Counts& counts(uint32_t context, bool for_write, How how) {
    return counts_[context][for_write ? 1 : 0][static_cast<size_t>(how)];
  }
  uint64_t count(uint32_t context, bool for_write, How how, uint64_t page) const {
    const Counts& counts = counts_[context][for_write ? 1 : 0][static_cast<size_t>(how)];
    const auto it = counts.find(page);
    return it == counts.end() ? 0 : it->second;
  }
  // The distinct IOVA pages in [first, end) that a context holds; for write only, or any way.
  std::set<uint64_t> held(uint32_t context, bool only_for_write, uint64_t first,
                          uint64_t end) const {
    std::set<uint64_t> pages;
    for (size_t for_write = only_for_write ? 1 : 0; for_write < 2; ++for_write) {
      for (const Counts& counts : counts_[context][for_write]) {
        for (auto it = counts.lower_bound(first); it != counts.end() && it->first < end; ++it) {
          pages.insert(it->first);
        }
      }
    }
    return pages;
  }
  bool holds_any(uint32_t context, const std::vector<NaiveMapping>& parts) const {
    for (const auto& kind : counts_[context]) {
      for (const Counts& counts : kind) {
        for (const NaiveMapping& part : parts) {
          const auto it = counts.lower_bound(part.first);
          if (it != counts.end() && it->first < part.end()) return true;
        }
      }
    }
    return false;
  }
  const std::map<Backing, uint64_t>& backing() const { return backing_; }
  uint64_t pinned() const { return pinned_; }  // sum over pins

 private:
  template <typename Map, typename Key>
  static void Drop(Map& map, const Key& key) {
    const auto it = map.find(key);
    if (--it->second == 0) map.erase(it);
  }

  std::array<std::array<std::array<Counts, 3>, 2>, kContexts> counts_;  // context, write?, how
  std::map<Backing, uint64_t> backing_;                                 // how often, all in all
  uint64_t pinned_ = 0;
};

// The dirty log. `maybe`: pages of calls that failed half-way, which may be marked or not.
struct NaiveDirty {
  bool on = false;
  std::set<uint64_t> marked;
  std::set<uint64_t> maybe;

  void mark(uint64_t first, uint64_t count) {
    for (uint64_t page = first; on && page < first + count; ++page) marked.insert(page);
  }
  void mark_maybe(uint64_t first, uint64_t count) {
    for (uint64_t page = first; on && page < first + count; ++page) maybe.insert(page);
  }
  void forget(uint64_t first, uint64_t end) {
    marked.erase(marked.lower_bound(first), marked.lower_bound(end));
    maybe.erase(maybe.lower_bound(first), maybe.lower_bound(end));
  }
};

}  // namespace mvgpu::domain::model
