#pragma once

#include <absl/container/flat_hash_map.h>

#include <cstdint>
#include <mutex>
#include <span>

#include "apionly-domain/base/address.h"

namespace mvgpu::bench {

// What one writes first: a hash table from page to address and count, and a mutex around each
// operation (the Go and Rust device models do this, with their languages' maps).
class HashCounters {
 public:
  explicit HashCounters(std::span<const Iova> pages) {
    entries_.reserve(pages.size());
    for (const Iova page : pages) entries_.try_emplace(page.page(), Entry{page.value(), 1});
  }
  void pin(std::span<const Iova> pages) {
    for (const Iova page : pages) {
      std::lock_guard lock(mutex_);
      ++entries_.find(page.page())->second.count;
    }
  }
  void release(std::span<const Iova> pages) {
    for (const Iova page : pages) {
      std::lock_guard lock(mutex_);
      --entries_.find(page.page())->second.count;
    }
  }

 private:
  struct Entry {
    uint64_t address;
    uint32_t count;
  };
  std::mutex mutex_;
  absl::flat_hash_map<uint64_t, Entry> entries_;
};

}  // namespace mvgpu::bench
