#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include <absl/container/flat_hash_map.h>

#include "apionly-domain/base/address.h"
#include "apionly-domain/base/mutex.h"

namespace mvgpu::domain {

// Where the host sees each IOVA that is mapped with a file: a page table in software.
//
//   chunk    1 GiB   one word per chunk below kNearEnd in a flat array, the others in a hash table
//   granule  2 MiB   512 words per chunk, only where a mapping does not cover the whole chunk
//   page     4 KiB   512 words per granule, only where a mapping does not cover the whole granule
//
// A word is 0 (nothing), a run (host address of the first byte, rights in the low bits) or a table.
// The host address is computed, not stored per page: 64 GiB of guest memory in 8 mappings are 64
// words, so a translation is two loads that hit the first-level cache (tests/bench, "translate"),
// and it costs the same for 1 mapping or 1024.
//
// Thread safety: one writer at a time (the container's change lock). Readers take no lock, but run
// inside a read section that the owner of the directory knows (a context's lock, an access slot):
// tables that a writer replaced are handed out by take_retired() and may be freed only when every
// section that was open has ended. Words are single atomics: a reader sees a translation from
// before or after a change, never a mixture.
class PageDirectory {
 public:
  // The low bits of a word. kRead and kWrite have the values of Access.
  static constexpr uint64_t kRead = 1;
  static constexpr uint64_t kWrite = 2;
  static constexpr uint64_t kGoing = 4;  // about to be unmapped, or not wholly mapped yet: no use

  struct Found {
    uint64_t flags = 0;         // 0: nothing is mapped here
    std::byte* host = nullptr;  // of the address itself
    uint64_t left = 0;          // bytes up to the end of what this word covers
  };
  // One contiguous piece of a walk.
  struct Extent {
    IovaRange iova;
    std::byte* host;
  };
  // Where a walk ended early: the first address that does not have the wanted rights.
  struct Stop {
    Iova at;
    uint64_t flags;
  };

  PageDirectory();
  ~PageDirectory();
  PageDirectory(const PageDirectory&) = delete;
  PageDirectory& operator=(const PageDirectory&) = delete;

  // The generation stands for all translations of the address's neighbourhood: while it does not
  // change, none of them was taken away.
  uint64_t generation(Iova iova) const {
    return GenerationOf(iova).load(std::memory_order_acquire);
  }

  Found find(Iova iova) const { return FindIn(ChunkWord(iova.value() >> kChunkShift), iova); }
  // The IOVAs below 16 TiB, for loops: it is a pointer that the compiler can keep in a register,
  // and looks a word up with one test of everything that may be wrong with it.
  class Near {
   public:
    explicit Near(const PageDirectory& directory) : words_(directory.near_.get()) {}
    // The host address, if the access is allowed and the memory is not about to go. False for IOVAs
    // from 16 TiB on.
    [[gnu::always_inline]] bool find(Iova iova, uint64_t wanted, std::byte** host) const {
      const uint64_t chunk = iova.value() >> kChunkShift;
      if (chunk >= kNearChunks) return false;
      const uint64_t word = words_[chunk].load(std::memory_order_seq_cst);
      if (((word ^ wanted) & (wanted | kGoing | kTable)) == 0) [[likely]] {
        *host = HostOf(word) + (iova.value() & kChunkMask);
        return true;
      }
      const Found found = FindIn(word, iova);
      *host = found.host;
      return IsUsable(found.flags, wanted);
    }
    // The same for all of a range. False also where that would take more than one word.
    [[gnu::always_inline]] bool find(IovaRange range, uint64_t wanted, std::byte** host) const {
      const uint64_t chunk = range.start().value() >> kChunkShift;
      if (range.last().value() >> kChunkShift != chunk || chunk >= kNearChunks) return false;
      const uint64_t word = words_[chunk].load(std::memory_order_seq_cst);
      *host = HostOf(word) + (range.start().value() & kChunkMask);
      return ((word ^ wanted) & (wanted | kGoing | kTable)) == 0;
    }

   private:
    const std::atomic<uint64_t>* words_;
  };

  // Whether a word's flags allow an access, and the memory is not about to go.
  static constexpr bool IsUsable(uint64_t flags, uint64_t wanted) {
    return (flags & (wanted | kGoing)) == wanted;
  }

  // Calls visit(Extent) for each contiguous piece behind the range, in order; neighbours that
  // continue in host memory are one piece. Ends at the first address without the wanted rights.
  template <typename Visit>
  std::optional<Stop> walk(IovaRange range, uint64_t wanted, Visit visit) const {
    Iova first = range.start();  // of the piece that is being collected
    std::byte* host = nullptr;
    for (Iova at = first;;) {
      const Found found = find(at);
      if (!IsUsable(found.flags, wanted)) {
        if (at != first) visit(Extent{IovaRange::FromFirstAndLast(first, at + ~uint64_t{0}), host});
        return Stop{at, found.flags};
      }
      if (host == nullptr) {
        host = found.host;
      } else if (found.host != host + (at - first)) {
        visit(Extent{IovaRange::FromFirstAndLast(first, at + ~uint64_t{0}), host});
        first = at;
        host = found.host;
      }
      if (range.last() - at < found.left) {
        visit(Extent{IovaRange::FromFirstAndLast(first, range.last()), host});
        return std::nullopt;
      }
      at = at + found.left;
    }
  }

  // Writer's side. REQUIRES: page-aligned; map(): nothing is mapped there.
  void map(IovaRange range, std::byte* host, uint64_t rights);
  void set_going(IovaRange range, bool going);
  // Also gives the neighbourhood a new generation.
  void unmap(IovaRange range);

  struct Table;
  struct TableDeleter {
    void operator()(Table* table) const;
  };
  using RetiredTables = std::vector<std::unique_ptr<Table, TableDeleter>>;
  // Tables that no new reader can reach.
  RetiredTables take_retired() { return std::exchange(retired_, {}); }
  // Takes such tables back once no reader is left in them. A few are kept for the next mapping, so
  // that one that comes and goes does not make a table each time.
  void recycle(RetiredTables tables);

  static constexpr unsigned kTableShift = 9;
  static constexpr uint64_t kTableMask = (uint64_t{1} << kTableShift) - 1;
  static constexpr unsigned kGranuleShift = kPageShift + kTableShift;
  static constexpr unsigned kChunkShift = kGranuleShift + kTableShift;
  static constexpr uint64_t kChunkMask = (uint64_t{1} << kChunkShift) - 1;
  // 16 TiB: more than the RAM of a VM. IOVAs above work too, under a reader lock.
  static constexpr uint64_t kNearChunks = uint64_t{1} << 14;

  struct alignas(64) Table {
    std::array<std::atomic<uint64_t>, kTableMask + 1> words{};
    uint32_t used = 0;  // words that are not 0; writer's
  };

 private:
  static constexpr uint64_t kTable = 8;
  static constexpr uint64_t kFlags = 63;  // tables are aligned to more than that, runs to a page
  static constexpr size_t kGenerations = 256;
  static constexpr size_t kMaxSpare = 4;

  static std::byte* HostOf(uint64_t word) { return reinterpret_cast<std::byte*>(word & ~kFlags); }
  static const Table* TableOf(uint64_t word) {
    return reinterpret_cast<const Table*>(word & ~kFlags);
  }
  static Table* MutableTableOf(uint64_t word) { return reinterpret_cast<Table*>(word & ~kFlags); }

  static Found FindIn(uint64_t word, Iova iova) {
    unsigned shift = kChunkShift;
    while ((word & kTable) != 0) {
      shift -= kTableShift;
      word = TableOf(word)->words[(iova.value() >> shift) & kTableMask].load(
          std::memory_order_seq_cst);
    }
    const uint64_t offset = iova.value() & ((uint64_t{1} << shift) - 1);
    return {word & kFlags, HostOf(word) + offset, (uint64_t{1} << shift) - offset};
  }
  uint64_t ChunkWord(uint64_t chunk) const {
    // seq_cst, here and below: a reader that announced itself sees what was marked as going before
    // somebody found that nobody is there, see AccessSlots. A plain load on x86 in any case.
    if (chunk < kNearChunks) [[likely]] {
      return near_[chunk].load(std::memory_order_seq_cst);
    }
    return FarChunkWord(chunk);
  }
  uint64_t FarChunkWord(uint64_t chunk) const;

  // Sets every word of the range to change(word, first IOVA of the word), at the coarsest level
  // that the range and what is there allow.
  template <typename Change>
  void Update(IovaRange range, const Change& change);
  template <typename Change>
  void UpdateWord(std::atomic<uint64_t>& slot, unsigned shift, uint64_t start, IovaRange range,
                  const Change& change);
  // A table without words that are used.
  Table* TakeTable();
  // A table that says what the run word says.
  Table* Expand(uint64_t word, unsigned shift);

  const std::atomic<uint64_t>& GenerationOf(Iova iova) const {
    return generations_[(iova.value() >> kChunkShift) % kGenerations];
  }

  std::unique_ptr<std::atomic<uint64_t>[]> near_;
  mutable Mutex far_mutex_;  // innermost
  absl::flat_hash_map<uint64_t, std::unique_ptr<std::atomic<uint64_t>>> far_
      ABSL_GUARDED_BY(far_mutex_);
  std::array<std::atomic<uint64_t>, kGenerations> generations_{};
  RetiredTables retired_;  // writer's
  RetiredTables spare_;    // writer's; kMaxSpare at most
};

}  // namespace mvgpu::domain
