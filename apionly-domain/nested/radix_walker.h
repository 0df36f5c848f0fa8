#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "apionly-domain/nested/guest_tables.h"
#include "apionly-domain/nested/table_walker.h"

namespace mvgpu::domain {

// What an entry of a table says.
struct TableEntry {
  enum class Kind : uint8_t { kHole, kFault, kTable, kLeaf };
  Kind kind = Kind::kHole;
  FaultCode fault = FaultCode::kNotPresent;  // of kFault
  bool is_dirty = false;                     // of kLeaf, when it was visited: as a write leaves it
  uint64_t address = 0;                      // of the next table, or of the frame

  static TableEntry Hole() { return {}; }
  static TableEntry Bad(FaultCode code) { return {.kind = Kind::kFault, .fault = code}; }
  static TableEntry Table(uint64_t address) { return {.kind = Kind::kTable, .address = address}; }
  static TableEntry Leaf(uint64_t frame) { return {.kind = Kind::kLeaf, .address = frame}; }
};

// Why a walk cannot start.
struct NoStart {
  FaultCode code;
  uint64_t resumes_at = 0;  // the next address for which that may be different; 0: none
};

// Where a walk starts.
template <typename Path>
struct WalkStart {
  uint64_t table = 0;
  uint8_t level = 0;
  uint64_t input_mask = ~uint64_t{0};  // bits of an address that choose an entry or a byte
  Path path = {};
};

// The walk that all formats share: tables of tables, each indexed by some bits of the address.
// Level 0 is the table whose entries are 4 KiB pages. A Format says what is particular:
//
//   static constexpr uint8_t kStage
//   Path                        what is collected on the way down (rights), a small value
//   unsigned shift(level)       log2 of the bytes for which an entry of that level stands
//   unsigned index_bits(level)  log2 of the entries of a table below the first
//   begin(root, address)        tl::expected<WalkStart<Path>, NoStart>
//   decode(raw, level, &path)   what the entry says, and what it adds to the path
//   refusal(path, wanted)       optional<FaultCode>: a right that is missing at a leaf
//   rights(path, privileged)    Rights at a leaf
//   marked(raw, is_leaf, writes)  the entry with its accessed and dirty flags; `raw` without such
//   is_interrupt(out)           whether a result is where interrupts are written to
//
// An entry that has to be marked is exchanged for the marked one; if the guest changed it
// meanwhile, what it is now is decoded anew.
template <typename Format>
class RadixWalker final : public TableWalker {
  using Path = typename Format::Path;
  struct Cursor : WalkStart<Path> {
    bool is_first = true;
    void descend(uint64_t next) {
      this->table = next;
      --this->level;
      is_first = false;
    }
  };

 public:
  using FormatType = Format;

  // The tables that the last walk came through, without the first: a walk that shares some of them
  // begins at the lowest. For walks that belong to one moment, as those of a second stage under
  // one walk of the first one do: half of their loads are the same. Of one thread.
  class Trail {
    friend class RadixWalker;
    static constexpr size_t kMostLevels = 6;

    // Field by field: copying a cursor that was just written as a whole waits for the writes.
    struct Table {
      uint64_t address;
      Path path;
    };

    // False where nothing is shared.
    bool resume(const Format& format, uint64_t root, uint64_t address, Cursor* cursor) const {
      if (root != root_) return false;
      for (unsigned level = lowest_; level < end_; ++level) {
        if ((address ^ address_) >> format.shift(static_cast<uint8_t>(level + 1)) != 0) continue;
        cursor->table = tables_[level].address;
        cursor->level = static_cast<uint8_t>(level);
        cursor->input_mask = input_mask_;
        cursor->path = tables_[level].path;
        cursor->is_first = false;
        return true;
      }
      return false;
    }
    void start(uint64_t root, uint64_t address, const Cursor& cursor) {
      root_ = root;
      address_ = address;
      input_mask_ = cursor.input_mask;
      lowest_ = cursor.level;
      if (cursor.is_first) end_ = cursor.level;
    }
    void add(const Cursor& cursor) {
      tables_[cursor.level].address = cursor.table;
      tables_[cursor.level].path = cursor.path;
      lowest_ = cursor.level;
    }

    uint64_t root_ = 0;
    uint64_t address_ = 0;
    uint64_t input_mask_ = 0;
    uint8_t lowest_ = 0;  // levels from here on ...
    uint8_t end_ = 0;     // ... to before this one are known
    std::array<Table, kMostLevels> tables_;
  };

  // The tables must outlive this, and so must the trail if there is one.
  RadixWalker(Format format, const GuestTables* tables, Trail* trail = nullptr)
      : format_(format), tables_(*tables), trail_(trail) {}

  WalkResult walk(uint64_t root, uint64_t address, Wanted wanted) const override {
    Cursor cursor;
    if (trail_ == nullptr || !trail_->resume(format_, root, address, &cursor)) {
      const auto start = Begin(root, address);
      if (!start) return tl::unexpected(StartFault(start.error(), address));
      cursor = *start;
    }
    // Who wants nothing leaves no marks in the tables: the next one might have to.
    Trail* const trail = wanted.rights != 0 ? trail_ : nullptr;
    if (trail != nullptr) trail->start(root, address, cursor);
    while (true) {
      const auto entry = Visit(&cursor, address, &wanted);
      if (!entry) return tl::unexpected(entry.error());
      if (entry->kind == TableEntry::Kind::kLeaf) {
        const uint64_t span = SpanOf(cursor.level);
        const Rights rights = format_.rights(cursor.path, wanted.privileged);
        const Leaf leaf{entry->address | (address & (span - 1)), span, rights,
                        wanted.rights == 0 ? Rights{0} : MarkedRights(rights, entry->is_dirty)};
        if (!format_.is_interrupt(leaf.out)) return leaf;
        return tl::unexpected(MakeFault(FaultCode::kInterruptRange, cursor.level, address));
      }
      cursor.descend(entry->address);
      if (trail != nullptr) trail->add(cursor);
    }
  }

  Stretch walk_pages(uint64_t root, uint64_t address, std::span<PageWord> words) const override {
    auto cursor = Begin(root, address);
    if (!cursor) {
      const uint64_t resumes = cursor.error().resumes_at;
      return {.fault = StartFault(cursor.error(), address),
              .fault_pages = resumes == 0 ? PagesLeft(address, 0) : PagesIn(resumes - address)};
    }
    while (cursor->level > 0) {
      const auto entry = Visit(&*cursor, address, nullptr);
      if (!entry) return HoleOrFault(entry.error(), address);
      if (entry->kind == TableEntry::Kind::kLeaf) return LargeLeaf(*cursor, *entry, address, words);
      cursor->descend(entry->address);
    }
    return LastTable(*cursor, address, words);
  }

 private:
  static constexpr int kMarkTries = 8;
  static constexpr size_t kEntriesAtATime = 512;

  // What a walk has marked the entries for, the last one of which is dirty or is not.
  static Rights MarkedRights(Rights rights, bool is_dirty) {
    return is_dirty ? rights : static_cast<Rights>(rights & ~kMayWrite);
  }

  uint64_t SpanOf(uint8_t level) const { return uint64_t{1} << format_.shift(level); }
  // Pages from `address` on to the end of `span`; everything there is for a span of 0.
  static uint64_t PagesLeft(uint64_t address, uint64_t span) {
    return PagesIn((span == 0 ? ~address : span - 1 - (address & (span - 1)))) + 1;
  }
  uint64_t IndexOf(const Cursor& cursor, uint64_t address) const {
    const uint64_t index = (address & cursor.input_mask) >> format_.shift(cursor.level);
    return cursor.is_first ? index
                           : index & ((uint64_t{1} << format_.index_bits(cursor.level)) - 1);
  }

  tl::expected<Cursor, NoStart> Begin(uint64_t root, uint64_t address) const {
    const auto start = format_.begin(root, address);
    if (start) return Cursor{*start, true};
    return tl::unexpected(start.error());
  }
  static Fault StartFault(const NoStart& none, uint64_t address) {
    return {
        .code = none.code, .stage = Format::kStage, .address = address, .device_address = address};
  }

  Fault MakeFault(FaultCode code, uint8_t level, uint64_t address) const {
    return {.code = code,
            .stage = Format::kStage,
            .level = level,
            .address = address,
            .span = SpanOf(level),
            .device_address = address};
  }
  // A fault from reading a table: of this walk, unless it comes with a stage of its own.
  Fault TableFault(Fault fault, uint8_t level, uint64_t address) const {
    if (fault.stage == 0) return MakeFault(fault.code, level, address);
    fault.on_table = true;
    fault.table_level = level;
    fault.device_address = address;
    return fault;
  }

  // Reads and decodes the entry for `address`; a table or a leaf. Without a wish: for keeping.
  tl::expected<TableEntry, Fault> Visit(Cursor* cursor, uint64_t address,
                                        const Wanted* wanted) const {
    const uint64_t at = cursor->table + IndexOf(*cursor, address) * sizeof(uint64_t);
    uint64_t raw = 0;
    if (const auto loaded = tables_.load(at, std::span(&raw, 1)); !loaded) {
      return tl::unexpected(TableFault(loaded.error(), cursor->level, address));
    }
    return Take(cursor, at, raw, address, wanted);
  }

  // The entry as it was read, marked if need be.
  tl::expected<TableEntry, Fault> Take(Cursor* cursor, uint64_t at, uint64_t raw, uint64_t address,
                                       const Wanted* wanted) const {
    const uint8_t level = cursor->level;
    for (int tries = 0; tries < kMarkTries; ++tries) {
      Path path = cursor->path;
      TableEntry entry = format_.decode(raw, level, &path);
      if (entry.kind == TableEntry::Kind::kHole) {
        return tl::unexpected(MakeFault(FaultCode::kNotPresent, level, address));
      }
      if (entry.kind == TableEntry::Kind::kFault) {
        return tl::unexpected(MakeFault(entry.fault, level, address));
      }
      const bool is_leaf = entry.kind == TableEntry::Kind::kLeaf;
      bool writes = is_leaf && (format_.rights(path, false) & kMayWrite) != 0;
      if (is_leaf && wanted != nullptr) {
        if (const auto refused = format_.refusal(path, *wanted)) {
          return tl::unexpected(MakeFault(*refused, level, address));
        }
        writes = (wanted->rights & kMayWrite) != 0;
      }
      // Not by who only asks; nor, for keeping, where there is nothing for users.
      const bool is_used =
          wanted != nullptr ? wanted->rights != 0 : !is_leaf || format_.rights(path, false) != 0;
      const uint64_t marked = is_used ? format_.marked(raw, is_leaf, writes) : raw;
      entry.is_dirty = is_leaf && format_.marked(marked, true, true) == marked;
      if (marked == raw) {
        cursor->path = path;
        return entry;
      }
      const auto found = tables_.compare_exchange(at, raw, marked);
      if (!found) return tl::unexpected(TableFault(found.error(), level, address));
      if (*found == raw) {
        cursor->path = path;
        return entry;
      }
      raw = *found;
    }
    return tl::unexpected(MakeFault(FaultCode::kUpdateFailed, level, address));
  }

  static Stretch FaultAt(Stretch stretch, const Fault& fault, uint64_t address) {
    stretch.fault = fault;
    stretch.fault_pages = fault.on_table ? 1 : PagesLeft(address, fault.span);
    return stretch;
  }
  static Stretch HoleOrFault(const Fault& fault, uint64_t address) {
    if (fault.code != FaultCode::kNotPresent || fault.on_table) return FaultAt({}, fault, address);
    return {.pages = PagesLeft(address, fault.span), .is_hole = true, .fault = {}};
  }

  Stretch LargeLeaf(const Cursor& cursor, const TableEntry& entry, uint64_t address,
                    std::span<PageWord> words) const {
    const uint64_t span = SpanOf(cursor.level);
    const uint64_t pages = PagesLeft(address, span);
    const Rights rights = format_.rights(cursor.path, false) & (kMayRead | kMayWrite);
    if (rights == 0) return {.pages = pages, .is_hole = true, .fault = {}};
    const uint64_t count = std::min<uint64_t>(words.size(), pages);
    PageWord word = MakePageWord(entry.address | (address & (span - 1)), rights);
    for (uint64_t i = 0; i < count; ++i, word += kPageSize) {
      if (format_.is_interrupt(FrameOf(word).value())) {
        return {.pages = i,
                .fault = MakeFault(FaultCode::kInterruptRange, cursor.level, address + BytesIn(i)),
                .fault_pages = 1};
      }
      words[i] = word;
    }
    return {.pages = count, .fault = {}};
  }

  Stretch LastTable(const Cursor& table, uint64_t address, std::span<PageWord> words) const {
    const uint64_t first = IndexOf(table, address);
    const uint64_t entries = uint64_t{1} << format_.index_bits(0);
    const uint64_t at = table.table + first * sizeof(uint64_t);
    // Up to the end of the table, and not beyond the page that it lies in.
    const uint64_t left_in_page = (kPageSize - (at & kPageMask)) / sizeof(uint64_t);
    const uint64_t count = std::min({words.size(), size_t{entries - (first & (entries - 1))},
                                     size_t{left_in_page}, kEntriesAtATime});
    std::array<uint64_t, kEntriesAtATime> raw;
    const auto loaded = tables_.load(at, std::span(raw).first(count));
    if (!loaded) {
      const Fault fault = TableFault(loaded.error(), 0, address);
      Stretch stretch = FaultAt({}, fault, address);
      stretch.fault_pages = std::max(stretch.fault_pages, count);  // all of this part of the table
      return stretch;
    }
    for (uint64_t i = 0; i < count; ++i) {
      Path path = table.path;
      const TableEntry entry = format_.decode(raw[i], 0, &path);
      if (entry.kind == TableEntry::Kind::kHole) {
        words[i] = 0;
        continue;
      }
      const Rights rights = format_.rights(path, false);
      if (entry.kind == TableEntry::Kind::kLeaf && !format_.is_interrupt(entry.address) &&
          format_.marked(raw[i], true, (rights & kMayWrite) != 0) == raw[i]) [[likely]] {
        words[i] = MakePageWord(entry.address, rights);
        continue;
      }
      const uint64_t page = address + BytesIn(i);
      const auto word = MarkedWord(table, at + i * sizeof(uint64_t), raw[i], page);
      if (!word) return FaultAt({.pages = i, .fault = {}}, word.error(), page);
      words[i] = *word;
    }
    return {.pages = count, .fault = {}};
  }

  // The slow way for one entry: one that is faulty or has to be marked.
  tl::expected<PageWord, Fault> MarkedWord(Cursor cursor, uint64_t at, uint64_t raw,
                                           uint64_t address) const {
    const auto entry = Take(&cursor, at, raw, address, nullptr);
    if (entry && format_.is_interrupt(entry->address)) {
      return tl::unexpected(MakeFault(FaultCode::kInterruptRange, 0, address));
    }
    if (entry) return MakePageWord(entry->address, format_.rights(cursor.path, false));
    if (entry.error().code == FaultCode::kNotPresent) return PageWord{0};
    return tl::unexpected(entry.error());
  }

  const Format format_;
  const GuestTables& tables_;  // outlives this: contract of the constructor
  Trail* const trail_;         // may be null; the same
};

}  // namespace mvgpu::domain
