#include "apionly-domain/assigned/software_iommu.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <utility>

namespace mvgpu::domain {

namespace {

constexpr unsigned kLevelBits = 9;
constexpr unsigned kTopLevel = 3;
constexpr unsigned kLargestLeaf = 2;  // 1 GiB

constexpr unsigned ShiftOf(unsigned level) { return kPageShift + kLevelBits * level; }
constexpr uint64_t SizeOf(unsigned level) { return uint64_t{1} << ShiftOf(level); }
constexpr size_t IndexOf(Iova iova, unsigned level) {
  return iova.value() >> ShiftOf(level) & ((1u << kLevelBits) - 1);
}

// The largest page that can begin here.
unsigned LevelFor(Iova iova, const std::byte* host, uint64_t size) {
  const uint64_t bits = iova.value() | std::bit_cast<uint64_t>(host);
  unsigned level = kLargestLeaf;
  while (level > 0 && (size < SizeOf(level) || (bits & (SizeOf(level) - 1)) != 0)) --level;
  return level;
}

// As on x86: interrupts are raised by writes to 0xfeexxxxx, so no memory can be there.
std::array<IovaRange, 2> UsableRanges() {
  return {IovaRange::FromFirstAndLast(Iova(0), Iova(0xfedfffff)),
          IovaRange::FromFirstAndLast(Iova(0xfef00000),
                                      Iova((uint64_t{1} << SoftwareIommu::kAddressBits) - 1))};
}

}  // namespace

struct SoftwareIommu::Table {
  std::array<Entry, 1u << kLevelBits> entries;
  unsigned used = 0;
};

SoftwareIommu::SoftwareIommu() : usable_(UsableRanges()), root_(std::make_unique<Table>()) {}
SoftwareIommu::~SoftwareIommu() = default;

uint64_t SoftwareIommu::page_sizes() const { return SizeOf(0) | SizeOf(1) | SizeOf(2); }

Result<void> SoftwareIommu::map(IovaRange iova, std::byte* host, Access access) {
  const bool is_usable = std::any_of(usable_.begin(), usable_.end(),
                                     [&](const IovaRange& range) { return range.contains(iova); });
  if (!is_usable || !iova.is_page_aligned() || (std::bit_cast<uint64_t>(host) & kPageMask) != 0) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("device iova {:#x}-{:#x} is not whole pages of one usable range",
                            iova.start().value(), iova.last().value()));
  }
  MutexLock lock(mutex_);
  const auto next = mappings_.lower_bound(iova.start().page());
  if ((next != mappings_.end() && next->second.overlaps(iova)) ||
      (next != mappings_.begin() && std::prev(next)->second.overlaps(iova))) {
    return Fail(ErrorCode::kOverlap,
                fmt::format("something is mapped in device iova {:#x}-{:#x} already",
                            iova.start().value(), iova.last().value()));
  }
  mappings_.emplace(iova.start().page(), iova);
  ++counters_.mappings;
  for (uint64_t done = 0; done < iova.size();) {
    const unsigned level = LevelFor(iova.start() + done, host + done, iova.size() - done);
    Entry& entry = EntryFor(iova.start() + done, level);
    entry.host = host + done;
    entry.access = static_cast<uint8_t>(access);
    ++counters_.pages[level];
    done += SizeOf(level);
  }
  return {};
}

std::unique_ptr<SoftwareIommu::Table> SoftwareIommu::TakeTable() {
  ++counters_.tables;
  if (spare_.empty()) return std::make_unique<Table>();
  std::unique_ptr<Table> table = std::move(spare_.back());
  spare_.pop_back();
  return table;
}

void SoftwareIommu::GiveTableBack(std::unique_ptr<Table> table) {
  --counters_.tables;
  if (spare_.size() < kMostSpareTables) spare_.push_back(std::move(table));
}

// The entry of a level, free until now; tables on the way are made, and the entry counts as used.
SoftwareIommu::Entry& SoftwareIommu::EntryFor(Iova iova, unsigned level) {
  Table* table = root_.get();
  for (unsigned at = kTopLevel; at > level; --at) {
    Entry& entry = table->entries[IndexOf(iova, at)];
    if (entry.table == nullptr) {
      entry.table = TakeTable();
      ++table->used;
    }
    table = entry.table.get();
  }
  Entry& entry = table->entries[IndexOf(iova, level)];
  MVGPU_CHECK(!entry.is_used());
  ++table->used;
  return entry;
}

Result<void> SoftwareIommu::unmap(IovaRange iova) {
  MutexLock lock(mutex_);
  const auto found = mappings_.find(iova.start().page());
  if (found == mappings_.end() || !(found->second == iova)) {
    const auto next = mappings_.lower_bound(iova.start().page());
    const bool cuts = (next != mappings_.end() && next->second.overlaps(iova)) ||
                      (next != mappings_.begin() && std::prev(next)->second.overlaps(iova));
    return Fail(cuts ? ErrorCode::kWouldSplit : ErrorCode::kNotMapped,
                fmt::format("device iova {:#x}-{:#x} is not one mapping", iova.start().value(),
                            iova.last().value()));
  }
  mappings_.erase(found);
  --counters_.mappings;
  Clear(*root_, kTopLevel, iova);
  return {};
}

// Clears the leaves of the range and lets go of the tables that have become empty. Leaves are never
// cut: a mapping goes as a whole.
void SoftwareIommu::Clear(Table& table, unsigned level, IovaRange range) {
  const size_t first = IndexOf(range.start(), level);
  const size_t last = IndexOf(range.last(), level);
  const uint64_t base = range.start().value() >> (ShiftOf(level) + kLevelBits)
                                                     << (ShiftOf(level) + kLevelBits);
  for (size_t i = first; i <= last; ++i) {
    Entry& entry = table.entries[i];
    if (entry.table != nullptr) {
      const Iova start(base + i * SizeOf(level));
      const IovaRange part =
          *range.intersection(IovaRange::FromFirstAndLast(start, start + (SizeOf(level) - 1)));
      Clear(*entry.table, level - 1, part);
      if (entry.table->used != 0) continue;
      GiveTableBack(std::move(entry.table));
    } else {
      MVGPU_CHECK(entry.access != 0);
      entry = Entry();
      --counters_.pages[level];
    }
    --table.used;
  }
}

void SoftwareIommu::flush() {
  MutexLock lock(mutex_);
  if (!is_any_cached_) return;
  cached_.fill(Cached());
  is_any_cached_ = false;
}

std::byte* SoftwareIommu::translate(Iova iova, Access access) {
  MutexLock lock(mutex_);
  Cached& cached = cached_[iova.page() % kCachedTranslations];
  Cached found = cached;
  if (found.page == iova.page()) {
    ++counters_.cached_hits;
  } else {
    found = Walk(iova);
    if (found.access != 0) {  // as in hardware: only what is mapped is remembered
      cached = found;
      is_any_cached_ = true;
    }
  }
  // An access of 0 allows nothing.
  if (!Allows(static_cast<Access>(found.access), access)) {
    ++counters_.faults;
    last_fault_ = Fault{iova, access, found.access != 0};
    return nullptr;
  }
  return found.host + iova.offset_in_page();
}

SoftwareIommu::Cached SoftwareIommu::Walk(Iova iova) {
  ++counters_.walks;
  if (iova.value() >> kAddressBits != 0) return {};
  const Table* table = root_.get();
  for (unsigned level = kTopLevel;; --level) {
    const Entry& entry = table->entries[IndexOf(iova, level)];
    if (entry.access != 0) {
      const uint64_t offset = iova.value() & (SizeOf(level) - 1) & ~kPageMask;
      return {iova.page(), entry.host + offset, entry.access};
    }
    if (entry.table == nullptr) return {};
    table = entry.table.get();
  }
}

SoftwareIommu::Counters SoftwareIommu::counters() const {
  MutexLock lock(mutex_);
  Counters counters = counters_;
  counters.spare_tables = spare_.size();
  return counters;
}

std::optional<SoftwareIommu::Fault> SoftwareIommu::last_fault() const {
  MutexLock lock(mutex_);
  return last_fault_;
}

}  // namespace mvgpu::domain
