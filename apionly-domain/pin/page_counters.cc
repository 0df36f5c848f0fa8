#include "apionly-domain/pin/page_counters.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "apionly-domain/base/check.h"

namespace mvgpu::domain {

namespace {

// Sixteen pages at a time: any vector unit of 64-bit machines has that.
using Vector = uint8_t __attribute__((vector_size(16)));
using Words = uint64_t __attribute__((vector_size(16)));  // the same bits

// Adds a value to all bytes, modulo 256, and says whether all of them were in [first, last] before.
// In one pass that is right nearly always, and undone when it was not.
bool AddToAll(uint8_t* bytes, uint64_t count, uint8_t value, uint8_t first, uint8_t last) {
  const auto width = static_cast<uint8_t>(last - first);
  const Vector limit = Vector{} + width;
  Vector outside{};
  uint64_t i = 0;
  for (; i + sizeof(Vector) <= count; i += sizeof(Vector)) {
    Vector vector;
    std::memcpy(&vector, bytes + i, sizeof(Vector));
    const Vector distance = vector - first;
    outside |= (distance > limit ? distance : limit) ^ limit;  // 0 where distance <= width
    vector += value;
    std::memcpy(bytes + i, &vector, sizeof(Vector));
  }
  const auto words = reinterpret_cast<Words>(outside);
  bool is_within = (words[0] | words[1]) == 0;
  for (; i < count; ++i) {
    is_within = is_within && static_cast<uint8_t>(bytes[i] - first) <= width;
    bytes[i] = static_cast<uint8_t>(bytes[i] + value);
  }
  return is_within;
}

void FreeArray(uint8_t* bytes) {
  if (bytes != nullptr) munmap(bytes, PageCounters::kChunkPages);
}

}  // namespace

PageCounters::~PageCounters() {
  for (const Chunk& chunk : near_) FreeArray(chunk.bytes);
  for (const auto& [index, chunk] : far_) FreeArray(chunk.bytes);
}

bool PageCounters::try_add(PageRun run) { return TryAddToAll(run, 1, kFewest, kMost - 1); }

bool PageCounters::try_remove(PageRun run) { return TryAddToAll(run, 0xff, kFewest + 1, kMost); }

bool PageCounters::TryAddToAll(PageRun run, uint8_t value, uint8_t first, uint8_t last) {
  for (uint64_t page = run.first; page < run.end();) {
    const uint64_t end = std::min(run.end(), (page | kChunkMask) + 1);
    uint8_t* bytes = find(page);
    const bool is_there = bytes != nullptr;
    if (!is_there || !AddToAll(bytes, end - page, value, first, last)) {
      const uint64_t done = is_there ? end : page;
      for (uint64_t undo = run.first; undo < done;) {
        const uint64_t undo_end = std::min(done, (undo | kChunkMask) + 1);
        AddToAll(find(undo), undo_end - undo, static_cast<uint8_t>(-value), 0, 0);
        undo = undo_end;
      }
      return false;
    }
    page = end;
  }
  return true;
}

void PageCounters::add(PageRun run) {
  for (uint64_t page = run.first; page < run.end();) {
    Chunk* chunk = GetChunk(page >> kChunkShift);
    const uint64_t end = std::min(run.end(), (page | kChunkMask) + 1);
    for (; page < end; ++page) AddOne(chunk, page);
  }
}

void PageCounters::AddOne(Chunk* chunk, uint64_t page) {
  uint8_t& byte = chunk->bytes[page & kChunkMask];
  if (byte == 0) {
    ++chunk->held;
    ++held_pages_;
  }
  if (byte < kMost) {
    ++byte;
  } else if (byte == kMost) {
    byte = kOverflowed;
    overflow_[page] = uint64_t{kMost} + 1;
  } else {
    ++overflow_[page];
  }
}

void PageCounters::remove(PageRun run, std::vector<PageRun>* freed) {
  for (uint64_t page = run.first; page < run.end(); ++page) {
    if (!RemoveOne(FindChunk(page >> kChunkShift), page)) continue;
    if (!freed->empty() && freed->back().end() == page) {
      ++freed->back().count;
    } else {
      freed->push_back({page, 1});
    }
  }
}

bool PageCounters::RemoveOne(Chunk* chunk, uint64_t page) {
  MVGPU_CHECK(chunk->bytes != nullptr);
  uint8_t& byte = chunk->bytes[page & kChunkMask];
  MVGPU_CHECK(byte != 0);  // released more often than held
  if (byte == kOverflowed) {
    const auto it = overflow_.find(page);
    if (--it->second == kMost) {
      overflow_.erase(it);
      byte = kMost;
    }
    return false;
  }
  if (--byte != 0) return false;
  --chunk->held;
  --held_pages_;
  return true;
}

uint64_t PageCounters::count(uint64_t page) const {
  const uint8_t* byte = find(page);
  if (byte == nullptr) return 0;
  return *byte == kOverflowed ? overflow_.at(page) : *byte;
}

bool PageCounters::any(PageRun run) const {
  if (held_pages_ == 0) return false;
  for (const uint64_t index : HeldChunks(run)) {
    const uint64_t first = std::max(run.first, index << kChunkShift);
    const uint64_t end = std::min(run.end(), (index + 1) << kChunkShift);
    const uint8_t* bytes = find(first);
    if (!std::all_of(bytes, bytes + (end - first), [](uint8_t byte) { return byte == 0; })) {
      return true;
    }
  }
  return false;
}

void PageCounters::trim(PageRun run) {
  if (run.count < kChunkPages) return;
  const auto free_if_idle = [run](uint64_t index, Chunk& chunk) {
    const uint64_t first = index << kChunkShift;
    if (chunk.held != 0 || first < run.first || first + kChunkPages > run.end()) return false;
    FreeArray(std::exchange(chunk.bytes, nullptr));
    return true;
  };
  for (uint64_t i = run.first >> kChunkShift; i < near_.size(); ++i) free_if_idle(i, near_[i]);
  absl::erase_if(far_, [&](auto& entry) { return free_if_idle(entry.first, entry.second); });
}

PageCounters::Chunk* PageCounters::FindFarChunk(uint64_t index) {
  static Chunk none;
  const auto it = far_.find(index);
  return it == far_.end() ? &none : &it->second;
}

PageCounters::Chunk* PageCounters::GetChunk(uint64_t index) {
  if (index < kNearChunks && index >= near_.size()) near_.resize(index + 1);
  Chunk& chunk = index < kNearChunks ? near_[index] : far_[index];
  if (chunk.bytes == nullptr) {
    void* bytes = mmap(nullptr, kChunkPages, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    MVGPU_CHECK(bytes != MAP_FAILED);  // out of address space
    chunk.bytes = static_cast<uint8_t*>(bytes);
  }
  return &chunk;
}

std::vector<uint64_t> PageCounters::HeldChunks(PageRun run) const {
  std::vector<uint64_t> held;
  const uint64_t first = run.first >> kChunkShift;
  const uint64_t last = (run.end() - 1) >> kChunkShift;
  for (uint64_t i = first; i <= last && i < near_.size(); ++i) {
    if (near_[i].held != 0) held.push_back(i);
  }
  const size_t near = held.size();
  for (const auto& [index, chunk] : far_) {
    if (chunk.held != 0 && index >= first && index <= last) held.push_back(index);
  }
  std::sort(held.begin() + static_cast<ptrdiff_t>(near), held.end());
  return held;
}

}  // namespace mvgpu::domain
