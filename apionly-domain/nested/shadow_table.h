#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>

#include <absl/container/btree_map.h>

#include "apionly-domain/base/address.h"
#include "apionly-domain/nested/table_walker.h"

namespace mvgpu::domain {

// What is mapped at which IOVA page: a word for each page, in chunks of 2 MiB that exist where
// something is mapped. Words and not runs, so that a part of a guest table that did not change is
// found equal by comparing memory. Not thread-safe.
class ShadowTable {
 public:
  static constexpr uint64_t kChunkPages = 512;

  struct Chunk {
    std::array<PageWord, kChunkPages> words = {};
    uint32_t used = 0;  // words that are not 0; kept by who writes them

    bool equals(size_t first, std::span<const PageWord> other) const {
      return std::memcmp(words.data() + first, other.data(), other.size_bytes()) == 0;
    }
  };
  using Chunks = absl::btree_map<uint64_t, std::unique_ptr<Chunk>>;  // by page / kChunkPages

  static constexpr uint64_t ChunkOf(uint64_t page) { return page / kChunkPages; }
  static constexpr size_t IndexOf(uint64_t page) { return page % kChunkPages; }

  // 0 where nothing is mapped.
  PageWord find(uint64_t page) const {
    const Chunk* chunk = find_chunk(ChunkOf(page));
    return chunk == nullptr ? 0 : chunk->words[IndexOf(page)];
  }
  const Chunk* find_chunk(uint64_t number) const {
    const auto it = chunks_.find(number);
    return it == chunks_.end() ? nullptr : it->second.get();
  }
  Chunk* find_chunk(uint64_t number) {
    return const_cast<Chunk*>(std::as_const(*this).find_chunk(number));
  }
  Chunk* make_chunk(uint64_t number) {
    std::unique_ptr<Chunk>& chunk = chunks_[number];
    if (chunk == nullptr) chunk = std::make_unique<Chunk>();
    return chunk.get();
  }
  // To be called when a chunk may have become empty.
  void drop_if_empty(uint64_t number) {
    const auto it = chunks_.find(number);
    if (it != chunks_.end() && it->second->used == 0) chunks_.erase(it);
  }
  // In order; also for looking through all of them.
  Chunks& chunks() { return chunks_; }

 private:
  Chunks chunks_;
};

}  // namespace mvgpu::domain
