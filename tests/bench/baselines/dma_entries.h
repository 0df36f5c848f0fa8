#pragma once

#include <absl/container/flat_hash_map.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <span>

#include "apionly-domain/base/address.h"

namespace mvgpu::bench {

// One 8-byte entry for each page of the guest, device address and count in one: what a hit of a
// cache costs when nothing is checked, looked up or locked.
class FlatEntries {
 public:
  explicit FlatEntries(uint64_t pages) : entries_(new uint64_t[pages]) {
    for (uint64_t page = 0; page < pages; ++page) entries_[page] = BytesIn(page) | 1;
  }
  void map(std::span<const Iova> pages, std::span<DmaAddr> addresses) {
    for (size_t i = 0; i < pages.size(); ++i) {
      addresses[i] = DmaAddr(entries_[pages[i].page()]++ & ~kPageMask);
    }
  }
  void unmap(std::span<const Iova> pages, std::span<const DmaAddr>) {
    for (const Iova page : pages) --entries_[page.page()];
  }

 private:
  std::unique_ptr<uint64_t[]> entries_;
};

// The same for several threads at a time without a lock, prefetched for a batch.
class AtomicEntries {
 public:
  explicit AtomicEntries(uint64_t pages) : entries_(new std::atomic<uint64_t>[pages]) {
    for (uint64_t page = 0; page < pages; ++page) {
      entries_[page].store(BytesIn(page) | 1, std::memory_order_relaxed);
    }
  }
  void map(std::span<const Iova> pages, std::span<DmaAddr> addresses) {
    for (const Iova page : pages) __builtin_prefetch(&entries_[page.page()], /*rw=*/1);
    for (size_t i = 0; i < pages.size(); ++i) {
      addresses[i] =
          DmaAddr(entries_[pages[i].page()].fetch_add(1, std::memory_order_acquire) & ~kPageMask);
    }
  }
  void unmap(std::span<const Iova> pages, std::span<const DmaAddr>) {
    for (const Iova page : pages) entries_[page.page()].fetch_sub(1, std::memory_order_release);
  }

 private:
  std::unique_ptr<std::atomic<uint64_t>[]> entries_;
};

// What one writes first: a hash table and a mutex around each operation.
class HashEntries {
 public:
  explicit HashEntries(std::span<const Iova> pages) {
    entries_.reserve(pages.size());
    for (const Iova page : pages) {
      entries_.try_emplace(page.page(), Entry{DmaAddr(page.value()), 1});
    }
  }
  void map(std::span<const Iova> pages, std::span<DmaAddr> addresses) {
    for (size_t i = 0; i < pages.size(); ++i) {
      std::lock_guard lock(mutex_);
      Entry& entry = entries_.find(pages[i].page())->second;
      ++entry.count;
      addresses[i] = entry.address;
    }
  }
  void unmap(std::span<const Iova> pages, std::span<const DmaAddr>) {
    for (const Iova page : pages) {
      std::lock_guard lock(mutex_);
      --entries_.find(page.page())->second.count;
    }
  }

 private:
  struct Entry {
    DmaAddr address;
    uint32_t count;
  };
  std::mutex mutex_;
  absl::flat_hash_map<uint64_t, Entry> entries_;
};

// A model of KVMGT's cache (GVT-g, kvmgt.c): one mutex, and each entry in two red-black trees, by
// guest frame and by dma address. map looks up by the one, unmap by the other.
class TwoTreeEntries {
 public:
  explicit TwoTreeEntries(std::span<const Iova> pages) {
    for (const Iova page : pages) {
      const auto [it, is_new] = by_frame_.try_emplace(page.page());
      if (!is_new) continue;
      it->second = std::make_unique<Entry>(Entry{DmaAddr(page.value()), 1});
      by_address_.emplace(page.value(), it->second.get());
    }
  }
  void map(std::span<const Iova> pages, std::span<DmaAddr> addresses) {
    for (size_t i = 0; i < pages.size(); ++i) {
      std::lock_guard lock(mutex_);
      Entry& entry = *by_frame_.find(pages[i].page())->second;
      entry.count.fetch_add(1, std::memory_order_relaxed);  // a kref
      addresses[i] = entry.address;
    }
  }
  void unmap(std::span<const Iova>, std::span<const DmaAddr> addresses) {
    for (const DmaAddr address : addresses) {
      std::lock_guard lock(mutex_);
      by_address_.find(address.value())->second->count.fetch_sub(1, std::memory_order_release);
    }
  }

 private:
  struct Entry {
    Entry(DmaAddr a, uint32_t c) : address(a), count(c) {}
    Entry(Entry&& other) noexcept : address(other.address), count(other.count.load()) {}
    DmaAddr address;
    std::atomic<uint32_t> count;
  };
  std::mutex mutex_;
  std::map<uint64_t, std::unique_ptr<Entry>> by_frame_;
  std::map<uint64_t, Entry*> by_address_;
};

}  // namespace mvgpu::bench
