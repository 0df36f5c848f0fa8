#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include <absl/hash/hash.h>

namespace mvgpu::domain {

// A cache of fixed size, as hardware has them: sets of four entries; a new one takes the place of
// the oldest of its set. Allocates in its constructor only. Key and Value are small values.
//
// Not thread-safe.
template <typename Key, typename Value>
class TaggedCache {
 public:
  static constexpr size_t kWays = 4;

  // Room for `entries`, rounded up to a power of two of at least kWays.
  explicit TaggedCache(size_t entries) : sets_(std::bit_ceil((entries + kWays - 1) / kWays)) {}

  // Null if there is none. Good until the next change.
  const Value* find(const Key& key) const {
    for (const auto& entry : SetOf(key).ways) {
      if (entry && entry->first == key) return &entry->second;
    }
    return nullptr;
  }

  // Replaces what was there for the key.
  void insert(const Key& key, const Value& value) {
    Set& set = SetOf(key);
    auto& place = PlaceIn(set, key);
    size_ += place ? 0 : 1;
    place.emplace(key, value);
  }

  // Removes what `matches(key, value)` is true for.
  template <typename Matches>
  void erase_if(Matches matches) {
    if (size_ == 0) return;
    for (Set& set : sets_) {
      for (auto& entry : set.ways) {
        if (!entry || !matches(entry->first, entry->second)) continue;
        entry.reset();
        --size_;
      }
    }
  }
  void clear() {
    erase_if([](const Key&, const Value&) { return true; });
  }

  size_t size() const { return size_; }
  size_t capacity() const { return sets_.size() * kWays; }

 private:
  struct Set {
    std::array<std::optional<std::pair<Key, Value>>, kWays> ways;
    uint8_t oldest = 0;
  };
  // Where the key is, or where there is room, or the oldest.
  static std::optional<std::pair<Key, Value>>& PlaceIn(Set& set, const Key& key) {
    for (auto& entry : set.ways) {
      if (entry && entry->first == key) return entry;
    }
    for (auto& entry : set.ways) {
      if (!entry) return entry;
    }
    return set.ways[set.oldest++ % kWays];
  }
  size_t IndexOf(const Key& key) const { return absl::Hash<Key>()(key) & (sets_.size() - 1); }
  const Set& SetOf(const Key& key) const { return sets_[IndexOf(key)]; }
  Set& SetOf(const Key& key) { return sets_[IndexOf(key)]; }

  std::vector<Set> sets_;
  size_t size_ = 0;
};

}  // namespace mvgpu::domain
