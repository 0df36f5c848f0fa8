#include "apionly-domain/accounting/row_mappings.h"

#include <atomic>
#include <iterator>

namespace mvgpu::domain {

using ledger_format::kMappingsPerChunk;
using ledger_format::kMaxMappings;
using ledger_format::LoadWord;
using ledger_format::MappingEntry;
using ledger_format::StoreWord;

// Readers that see the sequence odd, or another one afterwards, read again.
class RowMappings::Edit {
 public:
  explicit Edit(RowMappings& mappings)
      : row_(mappings.record_),
        sequence_(row_.mapping_sequence),
        is_ours_(mappings.store_.owns(mappings.id_)) {
    if (!is_ours_) return;  // the row was dropped, and may be somebody else's by now
    sequence_.store(sequence_.load(std::memory_order_relaxed) | 1, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_release);  // odd before any entry changes
  }
  Edit(const Edit&) = delete;
  Edit& operator=(const Edit&) = delete;
  ~Edit() {
    if (!is_ours_) return;
    sequence_.store(sequence_.load(std::memory_order_relaxed) + 1, std::memory_order_release);
  }
  bool is_ours() const { return is_ours_; }

 private:
  ledger_format::RowRecord& row_;
  std::atomic_ref<uint64_t> sequence_;
  const bool is_ours_;
};

void RowMappings::add(const LedgerMapping& mapping) {
  const Edit edit(*this);
  if (edit.is_ours()) Put(mapping);
}

void RowMappings::remove(IovaRange part) {
  const Edit edit(*this);
  if (!edit.is_ours()) return;
  auto it = listed_.upper_bound(part.last().value());
  if (it == listed_.begin()) return;
  --it;
  if (!it->second.mapping.iova.contains(part)) return;
  const Listed whole = it->second;
  listed_.erase(it);
  Clear(whole.place);
  const IovaRange range = whole.mapping.iova;
  if (range.start() < part.start()) {
    Put(whole.mapping.slice(
        IovaRange::FromFirstAndLast(range.start(), Iova(part.start().value() - 1))));
  }
  if (part.last() < range.last()) {
    Put(whole.mapping.slice(IovaRange::FromFirstAndLast(part.last() + 1, range.last())));
  }
}

void RowMappings::Put(const LedgerMapping& mapping) {
  const uint32_t place = FreePlace();
  MappingEntry* entry = EntryAt(place);
  if (entry == nullptr) {
    if (place != kNowhere) free_.push_back(place);
    CountUnlisted(1);
    listed_.insert_or_assign(mapping.iova.start().value(), Listed{mapping, kNowhere});
    return;
  }
  StoreWord(entry->iova, mapping.iova.start().value());
  StoreWord(entry->bytes, mapping.iova.size());
  StoreWord(entry->device, mapping.file.device);
  StoreWord(entry->inode, mapping.file.inode);
  StoreWord(entry->file_offset, mapping.file_offset);
  StoreWord(entry->access, static_cast<uint32_t>(mapping.access));
  StoreWord(entry->token, id_.token);
  listed_.insert_or_assign(mapping.iova.start().value(), Listed{mapping, place});
}

void RowMappings::Clear(uint32_t place) {
  if (place == kNowhere) return CountUnlisted(-1);
  // Nobody takes the space of a list away, so what was found once is there.
  if (MappingEntry* entry = EntryAt(place)) StoreWord(entry->token, uint64_t{0});
  free_.push_back(place);
}

MappingEntry* RowMappings::EntryAt(uint32_t place) {
  if (place == kNowhere) return nullptr;
  const uint64_t chunk = place / kMappingsPerChunk;
  if (!segment_.present(chunk)) {
    const auto segment = store_.make_mapping_room(id_, place);
    if (!segment) return nullptr;
    segment_ = *segment;
  }
  auto* entries = reinterpret_cast<MappingEntry*>(segment_.chunk(chunk));
  return entries == nullptr ? nullptr : entries + place % kMappingsPerChunk;
}

uint32_t RowMappings::FreePlace() {
  if (!free_.empty()) {
    const uint32_t place = free_.back();
    free_.pop_back();
    return place;
  }
  return next_place_ < kMaxMappings ? next_place_++ : kNowhere;
}

void RowMappings::CountUnlisted(int difference) {
  unlisted_ += static_cast<uint32_t>(difference);
  StoreWord(record_.unlisted_mappings, unlisted_);
}

}  // namespace mvgpu::domain
