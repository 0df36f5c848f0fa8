#include "apionly-domain/pin/page_counters.h"

#include <sys/mman.h>

#include <algorithm>
#include <utility>

#include "apionly-domain/base/check.h"
#include "apionly-domain/base/page_runs.h"

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

PageCounters::PageCounters()
    : near_memory_(kNearBytes), near_words_(static_cast<uint64_t*>(near_memory_.data())) {}

PageCounters::~PageCounters() {
  for (uint64_t i = 0; i < near_.size(); ++i) Free(i, &near_[i]);
  for (auto& [index, chunk] : far_) Free(index, &chunk);
}

void PageCounters::Free(uint64_t index, Chunk* chunk) {
  uint64_t* words = std::exchange(chunk->words, nullptr);
  if (words != nullptr && index < kNearChunks) {
    near_memory_.close(index * kWordBytes, kWordBytes);
  } else if (words != nullptr) {
    munmap(words, kWordBytes);
  }
  if (chunk->bytes != nullptr) munmap(std::exchange(chunk->bytes, nullptr), kChunkPages);
}

bool PageCounters::TryFlipOverChunks(PageRun run, uint64_t expected) {
  const uint64_t cut = std::min(run.end(), (run.first | kChunkMask) + 1);
  const PageRun head{run.first, cut - run.first};
  auto* words = const_cast<uint64_t*>(Find(head.first));
  if (words == nullptr || !TryFlip(words, head, expected)) return false;
  if (cut == run.end() || TryFlipOverChunks({cut, run.end() - cut}, expected)) return true;
  TryFlip(words, head, ~expected);  // back: what was 1 is 2, and what was 2 is 1
  return false;
}

template <typename Wanted>
bool PageCounters::AllWords(PageRun run, Wanted wanted) const {
  for (uint64_t page = run.first; page < run.end();) {
    const uint64_t* word = Find(page);
    if (word == nullptr) return false;
    const uint64_t chunk_end = std::min(run.end(), (page | kChunkMask) + 1);
    while (page < chunk_end) {
      const uint64_t in_word = page % kPagesPerWord;
      const uint64_t word_first = page - in_word;
      if (!wanted(*word, MaskOf(in_word, chunk_end - word_first))) return false;
      ++word;
      page = word_first + kPagesPerWord;
    }
  }
  return true;
}

bool PageCounters::all_held(PageRun run) const {
  return AllWords(run, [](uint64_t word, uint64_t mask) {
    return ((word | word >> 1) & kOnes & mask) == (kOnes & mask);
  });
}

bool PageCounters::all_held_twice(PageRun run) const {
  return AllWords(
      run, [](uint64_t word, uint64_t mask) { return (word & kTwos & mask) == (kTwos & mask); });
}

void PageCounters::add(PageRun run) {
  if (run.count == 1) return AddOne(GetChunk(run.first >> kChunkShift), run.first);
  for (uint64_t page = run.first; page < run.end();) {
    const uint64_t end = std::min(run.end(), (page | kChunkMask) + 1);
    AddInChunk(GetChunk(page >> kChunkShift), {page, end - page});
    page = end;
  }
}

// First pins and last releases come by here: where a word's pages all go from 0 to 1 or back, they
// go together.
void PageCounters::AddInChunk(Chunk* chunk, PageRun run) {
  for (uint64_t page = run.first; page < run.end();) {
    const uint64_t word_first = page - page % kPagesPerWord;
    const uint64_t end = std::min(run.end(), word_first + kPagesPerWord);
    const uint64_t mask = MaskOf(page - word_first, end - word_first);
    uint64_t& word = chunk->words[(page & kChunkMask) / kPagesPerWord];
    if ((word & mask) == 0) {
      word |= kOnes & mask;
      chunk->held += end - page;
      held_pages_ += end - page;
      page = end;
    }
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
  }
}

bool PageCounters::try_add_one(uint64_t page) {
  if (!holds(page)) return false;
  AddOne(FindChunk(page >> kChunkShift), page);
  return true;
}

bool PageCounters::try_remove_one(uint64_t page) {
  const uint64_t* word = Find(page);
  if (word == nullptr || (*word >> ShiftOf(page) & kMore) < 2) return false;
  RemoveOne(FindChunk(page >> kChunkShift), page);
  return true;
}

void PageCounters::AddToMany(Chunk* chunk, uint64_t page) {
  if (chunk->bytes == nullptr) chunk->bytes = static_cast<uint8_t*>(MapArray(kChunkPages));
  uint8_t& byte = chunk->bytes[page & kChunkMask];
  if (byte > kLargestByte) {
    ++more_[page];
    return;
  }
  chunk->many += byte == 0 ? 1 : 0;
  if (++byte > kLargestByte) more_[page] = kMore + byte;
}

void PageCounters::remove(PageRun run, std::vector<PageRun>* freed) {
  if (run.count == 1 && holds(run.first)) {
    if (RemoveOne(FindChunk(run.first >> kChunkShift), run.first)) AppendRun(run, freed);
    return;
  }
  for (uint64_t page = run.first; page < run.end();) {
    const uint64_t end = std::min(run.end(), (page | kChunkMask) + 1);
    Chunk* chunk = FindChunk(page >> kChunkShift);
    MVGPU_CHECK(chunk != nullptr && chunk->words != nullptr);  // released more often than held
    RemoveInChunk(chunk, {page, end - page}, freed);
    page = end;
  }
}

void PageCounters::RemoveInChunk(Chunk* chunk, PageRun run, std::vector<PageRun>* freed) {
  for (uint64_t page = run.first; page < run.end();) {
    const uint64_t word_first = page - page % kPagesPerWord;
    const uint64_t end = std::min(run.end(), word_first + kPagesPerWord);
    const uint64_t mask = MaskOf(page - word_first, end - word_first);
    uint64_t& word = chunk->words[(page & kChunkMask) / kPagesPerWord];
    if ((word & mask) == (kOnes & mask)) {
      word &= ~mask;
      chunk->held -= end - page;
      held_pages_ -= end - page;
      AppendRun({page, end - page}, freed);
      page = end;
    }
    for (; page < end; ++page) {
      if (RemoveOne(chunk, page)) AppendRun({page, 1}, freed);
    }
  }
}

bool PageCounters::RemoveOne(Chunk* chunk, uint64_t page) {
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
  if (chunk->many == 0) return true;
  uint8_t& byte = chunk->bytes[page & kChunkMask];
  if (byte == 0) return true;
  if (byte <= kLargestByte) {
    chunk->many -= --byte == 0 ? 1 : 0;
    return false;
  }
  const auto it = more_.find(page);
  if (--it->second <= kMore + kLargestByte) {
    more_.erase(it);
    byte = kLargestByte;
  }
  return false;
}

uint64_t PageCounters::count(uint64_t page) const {
  const uint64_t* word = Find(page);
  if (word == nullptr) return 0;
  const uint64_t count = *word >> ShiftOf(page) & kMore;
  if (count != kMore) return count;
  const Chunk* chunk = FindChunk(page >> kChunkShift);
  if (chunk->many == 0) return kMore;
  const uint8_t byte = chunk->bytes[page & kChunkMask];
  return byte <= kLargestByte ? kMore + byte : more_.at(page);
}

uint64_t PageCounters::forget(uint64_t page) {
  const uint64_t held = count(page);
  if (held == 0) return 0;
  Chunk* chunk = FindChunk(page >> kChunkShift);
  chunk->words[(page & kChunkMask) / kPagesPerWord] &= ~(kMore << ShiftOf(page));
  if (held > kMore) {
    chunk->bytes[page & kChunkMask] = 0;
    --chunk->many;
  }
  if (held > kMore + kLargestByte) more_.erase(page);
  --chunk->held;
  --held_pages_;
  return held;
}

bool PageCounters::any(PageRun run) const {
  if (held_pages_ == 0) return false;
  for (const uint64_t index : HeldChunks(run)) {
    const uint64_t first = std::max(run.first, index << kChunkShift);
    const uint64_t end = std::min(run.end(), (index + 1) << kChunkShift);
    const auto is_free = [](uint64_t word, uint64_t mask) { return (word & mask) == 0; };
    if (!AllWords({first, end - first}, is_free)) return true;
  }
  return false;
}

void PageCounters::trim(PageRun run) {
  if (run.count < kChunkPages) return;
  const auto free_if_idle = [this, run](uint64_t index, Chunk& chunk) {
    const uint64_t first = index << kChunkShift;
    if (chunk.held != 0 || first < run.first || first + kChunkPages > run.end()) return false;
    Free(index, &chunk);
    return true;
  };
  for (uint64_t i = run.first >> kChunkShift; i < near_.size(); ++i) free_if_idle(i, near_[i]);
  absl::erase_if(far_, [&](auto& entry) { return free_if_idle(entry.first, entry.second); });
}

const uint64_t* PageCounters::FindFar(uint64_t page) const {
  const Chunk* chunk = FindChunk(page >> kChunkShift);
  return chunk == nullptr ? nullptr : chunk->words + (page & kChunkMask) / kPagesPerWord;
}

const PageCounters::Chunk* PageCounters::FindChunk(uint64_t index) const {
  if (index < kNearChunks) return index < near_.size() ? &near_[index] : nullptr;
  const auto it = far_.find(index);
  return it == far_.end() ? nullptr : &it->second;
}

PageCounters::Chunk* PageCounters::OpenChunk(uint64_t index) {
  const bool is_near = index < kNearChunks;
  if (is_near && index >= near_.size()) near_.resize(index + 1);
  Chunk& chunk = is_near ? near_[index] : far_[index];
  if (chunk.words != nullptr) return &chunk;
  if (is_near) {
    near_memory_.open(index * kWordBytes, kWordBytes);
    chunk.words = near_words_ + index * (kChunkPages / kPagesPerWord);
  } else {
    chunk.words = static_cast<uint64_t*>(MapArray(kWordBytes));
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
