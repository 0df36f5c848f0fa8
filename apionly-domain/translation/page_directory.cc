#include "apionly-domain/translation/page_directory.h"

#include <algorithm>

#include "apionly-domain/base/check.h"

namespace mvgpu::domain {

namespace {

void FreeTables(uint64_t word, uint64_t table_flag, uint64_t flags) {
  if ((word & table_flag) == 0) return;
  auto* table = reinterpret_cast<PageDirectory::Table*>(word & ~flags);
  for (auto& child : table->words) {
    FreeTables(child.load(std::memory_order_relaxed), table_flag, flags);
  }
  delete table;
}

}  // namespace

void PageDirectory::TableDeleter::operator()(Table* table) const { delete table; }

PageDirectory::PageDirectory() : near_(std::make_unique<std::atomic<uint64_t>[]>(kNearChunks)) {}

PageDirectory::~PageDirectory() {
  for (uint64_t chunk = 0; chunk < kNearChunks; ++chunk) {
    FreeTables(near_[chunk].load(std::memory_order_relaxed), kTable, kFlags);
  }
  MutexLock lock(far_mutex_);
  for (const auto& [chunk, word] : far_) {
    FreeTables(word->load(std::memory_order_relaxed), kTable, kFlags);
  }
}

uint64_t PageDirectory::FarChunkWord(uint64_t chunk) const {
  ReaderMutexLock lock(far_mutex_);
  const auto it = far_.find(chunk);
  return it == far_.end() ? 0 : it->second->load(std::memory_order_seq_cst);
}

void PageDirectory::map(IovaRange range, std::byte* host, uint64_t rights) {
  const uint64_t base = reinterpret_cast<uint64_t>(host) - range.start().value();
  Update(range, [base, rights](uint64_t word, uint64_t start) {
    MVGPU_DCHECK(word == 0);
    static_cast<void>(word);
    return (base + start) | rights;
  });
}

void PageDirectory::set_going(IovaRange range, bool going) {
  Update(range, [going](uint64_t word, uint64_t) {
    if (word == 0) return word;
    return going ? word | kGoing : word & ~kGoing;
  });
}

void PageDirectory::unmap(IovaRange range) {
  Update(range, [](uint64_t, uint64_t) { return uint64_t{0}; });
  const uint64_t first = range.start().value() >> kChunkShift;
  const uint64_t chunks = (range.last().value() >> kChunkShift) - first + 1;
  for (uint64_t i = 0; i < std::min<uint64_t>(chunks, kGenerations); ++i) {
    generations_[(first + i) % kGenerations].fetch_add(1, std::memory_order_acq_rel);
  }
}

template <typename Change>
void PageDirectory::Update(IovaRange range, const Change& change) {
  const uint64_t last_chunk = range.last().value() >> kChunkShift;
  for (uint64_t chunk = range.start().value() >> kChunkShift; chunk <= last_chunk; ++chunk) {
    const uint64_t start = chunk << kChunkShift;
    if (chunk < kNearChunks) {
      UpdateWord(near_[chunk], kChunkShift, start, range, change);
      continue;
    }
    MutexLock lock(far_mutex_);
    auto& slot = far_[chunk];
    if (slot == nullptr) slot = std::make_unique<std::atomic<uint64_t>>(0);
    UpdateWord(*slot, kChunkShift, start, range, change);
    if (slot->load(std::memory_order_relaxed) == 0) far_.erase(chunk);
  }
}

template <typename Change>
void PageDirectory::UpdateWord(std::atomic<uint64_t>& slot, unsigned shift, uint64_t start,
                               IovaRange range, const Change& change) {
  const uint64_t word = slot.load(std::memory_order_relaxed);
  const uint64_t last = start + ((uint64_t{1} << shift) - 1);
  const bool whole = range.start().value() <= start && last <= range.last().value();
  if (whole && (word & kTable) == 0) {
    // seq_cst: who marks words as going looks for users next, see AccessSlots.
    slot.store(change(word, start), std::memory_order_seq_cst);
    return;
  }
  Table* table = MutableTableOf(word);
  if ((word & kTable) == 0) {
    table = Expand(word, shift);
    slot.store(reinterpret_cast<uint64_t>(table) | kTable, std::memory_order_release);
  }
  const unsigned child_shift = shift - kTableShift;
  const uint64_t first_child = (std::max(start, range.start().value()) >> child_shift) & kTableMask;
  const uint64_t last_child = (std::min(last, range.last().value()) >> child_shift) & kTableMask;
  for (uint64_t i = first_child; i <= last_child; ++i) {
    std::atomic<uint64_t>& child = table->words[i];
    const bool was_used = child.load(std::memory_order_relaxed) != 0;
    UpdateWord(child, child_shift, start + (i << child_shift), range, change);
    const bool is_used = child.load(std::memory_order_relaxed) != 0;
    table->used += static_cast<uint32_t>(is_used) - static_cast<uint32_t>(was_used);
  }
  if (table->used == 0) {
    slot.store(0, std::memory_order_release);
    retired_.emplace_back(table);
  }
}

void PageDirectory::recycle(RetiredTables tables) {
  for (auto& table : tables) {
    if (spare_.size() == kMaxSpare) return;
    spare_.push_back(std::move(table));  // its last word was set to 0 before it was retired
  }
}

PageDirectory::Table* PageDirectory::TakeTable() {
  if (spare_.empty()) return new Table;
  Table* table = spare_.back().release();
  spare_.pop_back();
  return table;
}

PageDirectory::Table* PageDirectory::Expand(uint64_t word, unsigned shift) {
  Table* table = TakeTable();
  if (word == 0) return table;
  const uint64_t step = uint64_t{1} << (shift - kTableShift);
  for (uint64_t i = 0; i <= kTableMask; ++i) {
    table->words[i].store(word + i * step, std::memory_order_relaxed);
  }
  table->used = static_cast<uint32_t>(kTableMask + 1);
  return table;
}

}  // namespace mvgpu::domain
