#include "tests/apionly-domain/model/naive_memory.h"

#include <algorithm>
#include <iterator>
#include <set>

namespace mvgpu::domain::model {

namespace {

bool Continues(const NaiveMapping& a, const NaiveMapping& b) {
  return a.file != kNoFile && a.file == b.file && a.access == b.access && a.end() == b.first &&
         a.file_page + a.count == b.file_page;
}

uint64_t CountMerged(const std::map<uint64_t, NaiveMapping>& mappings) {
  uint64_t merged = 0;
  const NaiveMapping* before = nullptr;
  for (const auto& [first, mapping] : mappings) {
    if (before == nullptr || !Continues(*before, mapping)) ++merged;
    before = &mapping;
  }
  return merged;
}

}  // namespace

const NaiveMapping* NaiveMemory::at(uint64_t page) const {
  const auto next = mappings_.upper_bound(page);
  if (next == mappings_.begin()) return nullptr;
  const NaiveMapping& mapping = std::prev(next)->second;
  return page < mapping.end() ? &mapping : nullptr;
}

std::vector<NaiveMapping> NaiveMemory::all() const {
  std::vector<NaiveMapping> all;
  for (const auto& [first, mapping] : mappings_) all.push_back(mapping);
  return all;
}

Verdict NaiveMemory::verdict_on_map(const NaiveMapping& wanted, bool* is_there) const {
  *is_there = false;
  for (const auto& [first, mapping] : mappings_) {
    if (mapping == wanted) {
      *is_there = true;
      return {};
    }
    if (mapping.first < wanted.end() && wanted.first < mapping.end()) return ErrorCode::kOverlap;
  }
  auto with_it = mappings_;
  with_it[wanted.first] = wanted;
  const bool grows = CountMerged(with_it) > CountMerged(mappings_);
  if (grows && merged() >= kMostMerged) return ErrorCode::kLimit;
  if (pieces() >= kMostPieces) return ErrorCode::kLimit;
  if (wanted.file != kNoFile && file_pages() + wanted.count > kMostFilePages) {
    return ErrorCode::kLimit;
  }
  return {};
}

std::vector<NaiveMapping> NaiveMemory::going(uint64_t first, uint64_t count, bool may_split,
                                             Verdict* verdict) const {
  std::vector<NaiveMapping> parts;
  bool splits_in_two = false;
  for (const auto& [unused, mapping] : mappings_) {
    const uint64_t start = std::max(first, mapping.first);
    const uint64_t end = std::min(first + count, mapping.end());
    if (start >= end) continue;
    if (end - start < mapping.count && !may_split) {
      *verdict = ErrorCode::kWouldSplit;
      return {};
    }
    if (start > mapping.first && end < mapping.end()) splits_in_two = true;
    NaiveMapping part = mapping;
    part.first = start;
    part.count = end - start;
    if (part.file != kNoFile) part.file_page += start - mapping.first;
    parts.push_back(part);
  }
  if (splits_in_two && (merged() >= kMostMerged || pieces() >= kMostPieces)) {
    *verdict = ErrorCode::kLimit;
    return {};
  }
  return parts;
}

void NaiveMemory::remove(const std::vector<NaiveMapping>& parts) {
  for (const NaiveMapping& part : parts) {
    const NaiveMapping whole = *at(part.first);
    mappings_.erase(whole.first);
    if (whole.first < part.first) {
      NaiveMapping head = whole;
      head.count = part.first - whole.first;
      add(head);
    }
    if (part.end() < whole.end()) {
      NaiveMapping tail = whole;
      tail.first = part.end();
      tail.count = whole.end() - part.end();
      if (tail.file != kNoFile) tail.file_page += tail.first - whole.first;
      add(tail);
    }
  }
}

Verdict NaiveMemory::verdict_on_access(uint64_t first, uint64_t count, Access access, bool remote,
                                       const std::vector<NaiveMapping>& going) const {
  for (uint64_t page = first; page < first + count;) {
    const NaiveMapping* mapping = at(page);
    if (mapping == nullptr) return ErrorCode::kNotMapped;
    uint64_t next = mapping->end();
    for (const NaiveMapping& part : going) {
      if (part.file == kNoFile) continue;
      if (part.first <= page && page < part.end()) return ErrorCode::kBusy;
      if (part.first > page) next = std::min(next, part.first);
    }
    const auto granted = static_cast<unsigned>(mapping->access);
    if ((static_cast<unsigned>(access) & ~granted) != 0) return ErrorCode::kPermission;
    if (mapping->file == kNoFile && !remote) return ErrorCode::kNotReachable;
    page = next;
  }
  return {};
}

uint64_t NaiveMemory::merged() const { return CountMerged(mappings_); }

uint64_t NaiveMemory::pages() const {
  uint64_t pages = 0;
  for (const auto& [first, mapping] : mappings_) pages += mapping.count;
  return pages;
}

uint64_t NaiveMemory::file_pages() const {
  uint64_t pages = 0;
  for (const auto& [first, mapping] : mappings_) {
    if (mapping.file != kNoFile) pages += mapping.count;
  }
  return pages;
}

uint64_t NaiveMemory::files() const {
  std::set<int> files;
  for (const auto& [first, mapping] : mappings_) {
    if (mapping.file != kNoFile) files.insert(mapping.file);
  }
  return files.size();
}

}  // namespace mvgpu::domain::model
