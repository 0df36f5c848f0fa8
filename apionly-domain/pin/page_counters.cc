#include "apionly-domain/pin/page_counters.h"

#include <sys/mman.h>

#include <algorithm>
#include <utility>

#include "apionly-domain/base/check.h"

namespace mvgpu::domain {

namespace {

// Zero pages of the kernel until they are written.
void* MapArray(size_t size) {
  void* array = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  MVGPU_CHECK(array != MAP_FAILED);  // out of address space
  return array;
}

}  // namespace

PageCounters::~PageCounters() {
  for (Chunk& chunk : near_) Free(&chunk);
  for (auto& [index, chunk] : far_) Free(&chunk);
}

void PageCounters::Free(Chunk* chunk) {
  if (chunk->words != nullptr) munmap(std::exchange(chunk->words, nullptr), kWordBytes);
  if (chunk->bytes != nullptr) munmap(std::exchange(chunk->bytes, nullptr), kChunkPages);
}

template <typename Visit>
uint64_t PageCounters::ForEachWord(PageRun run, Visit visit) {
  for (uint64_t page = run.first; page < run.end();) {
    uint64_t* word = find(page);
    if (word == nullptr) return page;
    const uint64_t chunk_end = std::min(run.end(), (page | kChunkMask) + 1);
    while (page < chunk_end) {
      const uint64_t in_word = page % kPagesPerWord;
      const uint64_t word_first = page - in_word;
      if (!visit(*word, MaskOf(in_word, chunk_end - word_first))) return page;
      ++word;
      page = word_first + kPagesPerWord;
    }
  }
  return run.end();
}

bool PageCounters::TryFlip(PageRun run, uint64_t expected) {
  const uint64_t last = run.end() - 1;
  if (run.first >> kChunkShift != last >> kChunkShift) return TryFlipOverChunks(run, expected);
  uint64_t* words = find(run.first);
  if (words == nullptr) return false;
  const uint64_t last_word = last / kPagesPerWord - run.first / kPagesPerWord;
  uint64_t head = ~uint64_t{0} << ShiftOf(run.first);
  const uint64_t tail = ~uint64_t{0} >> (62 - ShiftOf(last));
  if (last_word == 0) {
    head &= tail;
    if (((words[0] ^ expected) & head) != 0) return false;
    words[0] ^= head;
    return true;
  }
  if ((((words[0] ^ expected) & head) | ((words[last_word] ^ expected) & tail)) != 0) return false;
  for (uint64_t i = 1; i < last_word; ++i) {
    if (words[i] != expected) return false;
  }
  words[0] ^= head;
  std::fill(words + 1, words + last_word, ~expected);
  words[last_word] ^= tail;
  return true;
}

bool PageCounters::TryFlipOverChunks(PageRun run, uint64_t expected) {
  const uint64_t cut = (run.first | kChunkMask) + 1;
  const PageRun head{run.first, cut - run.first};
  if (!TryFlip(head, expected)) return false;
  if (TryFlip({cut, run.end() - cut}, expected)) return true;
  TryFlip(head, ~expected);  // back: what was 1 is 2, and what was 2 is 1
  return false;
}

bool PageCounters::all_held(PageRun run) const {
  return const_cast<PageCounters*>(this)->ForEachWord(run, [](uint64_t& word, uint64_t mask) {
    return ((word | word >> 1) & kOnes & mask) == (kOnes & mask);
  }) == run.end();
}

bool PageCounters::all_held_twice(PageRun run) const {
  return const_cast<PageCounters*>(this)->ForEachWord(run, [](uint64_t& word, uint64_t mask) {
    return (word & kTwos & mask) == (kTwos & mask);
  }) == run.end();
}

void PageCounters::add(PageRun run) {
  for (uint64_t page = run.first; page < run.end();) {
    Chunk* chunk = GetChunk(page >> kChunkShift);
    const uint64_t end = std::min(run.end(), (page | kChunkMask) + 1);
    for (; page < end; ++page) AddOne(chunk, page);
  }
}

void PageCounters::AddOne(Chunk* chunk, uint64_t page) {
  uint64_t& word = chunk->words[(page & kChunkMask) / kPagesPerWord];
  const uint64_t count = word >> ShiftOf(page) & kMore;
  if (count == kMore) return AddToMany(chunk, page);
  word += uint64_t{1} << ShiftOf(page);
  if (count == 0) {
    ++chunk->held;
    ++held_pages_;
  } else if (count + 1 == kMore) {
    if (chunk->bytes == nullptr) chunk->bytes = static_cast<uint8_t*>(MapArray(kChunkPages));
    chunk->bytes[page & kChunkMask] = kMore;
  }
}

void PageCounters::AddToMany(Chunk* chunk, uint64_t page) {
  uint8_t& byte = chunk->bytes[page & kChunkMask];
  if (byte > kLargestByte) {
    ++more_[page];
  } else if (++byte > kLargestByte) {
    more_[page] = uint64_t{kLargestByte} + 1;
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
  MVGPU_CHECK(chunk->words != nullptr);
  uint64_t& word = chunk->words[(page & kChunkMask) / kPagesPerWord];
  const uint64_t count = word >> ShiftOf(page) & kMore;
  MVGPU_CHECK(count != 0);  // released more often than held
  if (count == kMore && !RemoveFromMany(chunk, page)) return false;
  word -= uint64_t{1} << ShiftOf(page);
  if (count != 1) return false;
  --chunk->held;
  --held_pages_;
  return true;
}

bool PageCounters::RemoveFromMany(Chunk* chunk, uint64_t page) {
  uint8_t& byte = chunk->bytes[page & kChunkMask];
  if (byte <= kLargestByte) return --byte < kMore;
  const auto it = more_.find(page);
  if (--it->second <= kLargestByte) {
    more_.erase(it);
    byte = kLargestByte;
  }
  return false;
}

uint64_t PageCounters::count(uint64_t page) const {
  const uint64_t* word = find(page);
  if (word == nullptr) return 0;
  const uint64_t count = *word >> ShiftOf(page) & kMore;
  if (count != kMore) return count;
  const Chunk* chunk = const_cast<PageCounters*>(this)->FindChunk(page >> kChunkShift);
  const uint8_t byte = chunk->bytes[page & kChunkMask];
  return byte <= kLargestByte ? byte : more_.at(page);
}

bool PageCounters::any(PageRun run) const {
  if (held_pages_ == 0) return false;
  for (const uint64_t index : HeldChunks(run)) {
    const uint64_t first = std::max(run.first, index << kChunkShift);
    const uint64_t end = std::min(run.end(), (index + 1) << kChunkShift);
    const uint64_t stopped = const_cast<PageCounters*>(this)->ForEachWord(
        {first, end - first}, [](uint64_t& word, uint64_t mask) { return (word & mask) == 0; });
    if (stopped != end) return true;
  }
  return false;
}

void PageCounters::trim(PageRun run) {
  if (run.count < kChunkPages) return;
  const auto free_if_idle = [run](uint64_t index, Chunk& chunk) {
    const uint64_t first = index << kChunkShift;
    if (chunk.held != 0 || first < run.first || first + kChunkPages > run.end()) return false;
    Free(&chunk);
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
  if (chunk.words == nullptr) chunk.words = static_cast<uint64_t*>(MapArray(kWordBytes));
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
