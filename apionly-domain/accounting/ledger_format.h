#pragma once

// The ledger file: <runtime dir>/<vm uuid>.ledger, version 4.
//
// One file per VM, shared memory for every process with a domain of that VM. Little-endian; offsets
// in bytes from the start of the file; segments aligned to 4096. The file is sparse: space is never
// given out twice, and only what was touched costs memory.
//
//   offset   size         what
//   0        4096         LedgerHeader: magic, version, geometry, lock, sequence, end of space
//   4096     64 x 320     RowRecord[64], one per domain: owner, name, figures, changes
//   24576    256 x 1024   FileRecord[256], one per backing file: identity, offsets of its segments
//   286720   -            segments, in the order in which they were made
//
//   segment: SegmentHeader (64), directory (1 bit per chunk), padding to 4096, chunks of 4096 bytes
//     hold   one per (file, row): 1 bit per page that the row holds, 32768 pages per chunk
//     payer  at most one per file: 1 byte per page, row + 1 or 0 (nobody), 4096 pages per chunk
//     mapping  at most one per row: MappingEntry[16384], 64 per chunk
//
// A chunk whose directory bit is 0 is all zero and must not be touched: in a sparse tmpfs file even
// a read through a mapping allocates memory, and raises SIGBUS when there is none. A chunk is
// allocated with fallocate() first, then its bit is set.
//
// Who holds, who pays
//   - A row holds a page iff its bit is set. Nothing else says so, and only the row's own process
//     writes it: a crashed process's share is exactly its own bits, and dropping it means clearing
//     them.
//   - A page's payer is a function of the file's contents, total and unique: the row that the payer
//     byte names, if that row holds the page; else the lowest row that does. A byte that names a
//     row which does not hold the page names nobody.
//   So a held page has exactly one payer after every single store, whoever made it and wherever a
//   process was killed, and the charge moves to the next holder by the store that clears the
//   payer's bit. Payer bytes only make the charge stay where it is when a lower row comes later:
//   they are written there and nowhere else. Pages with one holder cost one bit per page and owner
//   and nothing else. word_protocol.h has the steps, and what is promised when two processes change
//   one page at the same time.
//
// Changes, and the lock
//   Holding and releasing takes no lock. A row announces each change: RowRecord::changes is odd
//   while one is under way; it is exchanged, so that what the row reads next is as new as that. A
//   change goes by what its process knows of the file's segments, if FileRecord::layout is still
//   the same as when that was looked up.
//   LedgerHeader::lock, a process-shared, robust, priority-inheriting mutex of the C library, is
//   for what is rare: joining, leaving, room for bits, a new place for a segment. Who takes a
//   segment away puts a new number into `layout` first, then waits until each row that had
//   announced a change has finished it: then nobody uses the segment, and nobody will, because
//   finding the new one takes the lock.
//   `sequence` is odd while the lock is held. When a process dies inside, the next one that takes
//   the lock drops the rows of the dead. There is nothing else to repair: no sum over rows is kept.
//
// Where pages are seen
//   A row of a domain that has a container lists its mappings, IOVAs to pages of files, for people
//   who have an address and ask about it; nothing is charged by them. Only the row's own process
//   writes the entries. One counts iff its `token` is the row's: so nobody has to clear what an
//   earlier owner of the row left. RowRecord::mapping_sequence is odd while entries change. What
//   does not fit is counted (`unlisted_mappings`), and missing.
//
// Readers take no lock: they copy the file with pread(). A copy during which neither `sequence` nor
// any row's `changes` moved is exact. In any other one a row's bits differ from those of a moment
// within the read by no more pages than its counters say that it took or gave away meanwhile:
// held_pages and released_pages only grow, each before the bits change.
//
// Liveness of a row's owner: (pid, start time) of a process of the same pid namespace. Whoever has
// the ledger open also holds a shared flock() on it, so a ledger without any has no living owner at
// all, but for those of rows that somebody else added for them (kRowRegistered): these processes
// know nothing of the ledger.

#include <pthread.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace mvgpu::domain::ledger_format {

inline constexpr uint64_t kMagic = 0x52474c555047564d;  // "MVGPULGR" in memory
inline constexpr uint32_t kVersion = 4;
inline constexpr uint32_t kPageShift = 12;
inline constexpr uint64_t kAlignment = 4096;
inline constexpr uint32_t kMaxRows = 64;
inline constexpr uint32_t kMaxFiles = 256;
inline constexpr uint32_t kMaxMappings = 16384;  // listed, of one row

inline constexpr uint64_t kRowTable = 4096;
inline constexpr uint64_t kFileTable = 24576;
inline constexpr uint64_t kSegments = 286720;
// Every process maps this much at once, so that nothing moves when the file grows.
inline constexpr uint64_t kMaxFileBytes = uint64_t{16} << 30;
inline constexpr uint64_t kMaxPagesPerFile = uint64_t{1}
                                             << 36;  // 256 TiB, so that sums cannot overflow

struct LedgerHeader {
  uint64_t magic;
  uint32_t version;
  uint32_t header_bytes;  // sizeof(LedgerHeader)
  uint32_t page_shift;
  uint32_t lock_bytes;  // sizeof(pthread_mutex_t): another C library has another lock
  uint32_t max_rows;
  uint32_t max_files;
  uint64_t row_table;
  uint64_t file_table;
  uint64_t segments;
  char vm_uuid[40];  // lower case, zero-terminated
  uint8_t reserved1[32];

  alignas(64) uint8_t lock[64];  // pthread_mutex_t

  uint64_t sequence;    // odd while somebody holds the lock
  uint64_t end;         // end of the space given out; never above the file's size
  uint64_t next_token;  // see RowRecord::token
  uint64_t repairs;     // how often a process died in the midst of a change or inside the lock
  uint32_t file_count;  // records of the file table in use or used before
  uint32_t lock_pid;    // who is inside the lock; 0: nobody
  uint64_t lock_start_time;
  uint64_t lock_pid_namespace;
  uint64_t next_layout;  // see FileRecord::layout
  uint8_t reserved2[3840];
};

enum RowState : uint32_t { kRowFree = 0, kRowActive = 1 };
// The owner does not know of its row: what the row holds, another process put there once.
enum RowFlags : uint32_t { kRowRegistered = 1 };

struct RowRecord {
  uint32_t state;          // written last, when a domain joins and when its row is dropped
  uint32_t kind;           // DomainKind
  uint32_t pid;            // in the namespace below
  uint32_t granule_pages;  // the largest of its pin back end; 1 at first
  uint64_t start_time;     // of the process, field 22 of /proc/PID/stat
  uint64_t pid_namespace;  // inode of /proc/PID/ns/pid; 0: unknown
  char name[56];           // zero-terminated
  char pin_backend[16];    // zero-terminated
  uint32_t flags;          // RowFlags
  uint32_t unlisted_mappings;
  uint64_t mapping_segment;  // 0: none. Stays when a row leaves, for the next one of that number.
  uint64_t mapping_sequence;

  // Figures, written by the owner alone.
  alignas(64) uint64_t mapped_pages;
  uint64_t pinned_pages;
  uint64_t locked_pages;
  uint64_t locked_areas;     // separate stretches that they are in
  uint64_t area_budget;      // how many of those the pin back end allows itself; 0: no limit
  uint64_t cached_pages;     // of the cache of device addresses in front of it: mapped now,
  uint64_t idle_pages;       // of these, used by nobody;
  uint64_t cache_hit_pages;  // asked for and there, since the row joined

  // Changes of bits. Written by the owner alone, but for the token.
  alignas(64) uint64_t changes;  // 2 for each hold and release; odd while one is under way
  uint64_t held_pages;           // bits set since the row joined
  uint64_t released_pages;       // bits cleared since then
  // Differs for every join: a row that was dropped is not its former owner's. 0 first of all when
  // a row is dropped.
  uint64_t token;
  // Figures again, of the cache, since the row joined:
  uint64_t cache_miss_pages;      // pinned and mapped
  uint64_t cache_unmapped_pages;  // for whatever reason
  uint64_t cache_revoked_pages;   // of these, because the VMM took them away or they moved
  uint64_t cache_evicted_pages;   // because others needed the room

  alignas(64) uint64_t cache_map_calls;  // ranges and batches asked for, and got
  uint64_t cache_mapper_calls;           // to map
  uint64_t cache_revocations;            // users told that pages were taken away
  uint64_t cache_moved_pages;            // of those revoked, because the kernel had moved them
  uint64_t reserved[4];
};

enum FileState : uint32_t { kFileFree = 0, kFileUsed = 1 };

struct FileRecord {
  uint32_t state;
  uint32_t reserved1;
  uint64_t device;
  uint64_t inode;
  uint64_t pages;          // the largest size that a row told
  uint64_t holder_rows;    // bit r: hold_segment[r] counts
  uint64_t layout;         // differs after each change of what is below, in all of the ledger
  uint64_t payer_segment;  // 0: none
  uint64_t reserved2;
  // 0: none. Stays when a row leaves, for the next row of that number.
  uint64_t hold_segment[kMaxRows];
  uint8_t reserved3[448];
};

enum SegmentKind : uint32_t { kHoldSegment = 1, kPayerSegment = 2, kMappingSegment = 3 };
inline constexpr uint32_t kSegmentMagic = 0x4753564d;  // "MVSG" in memory
inline constexpr uint64_t kChunkBytes = 4096;
inline constexpr uint64_t kPagesPerWord = 64;
inline constexpr uint64_t kWordsPerChunk = kChunkBytes / sizeof(uint64_t);
inline constexpr uint64_t kPagesPerHoldChunk = kChunkBytes * 8;
inline constexpr uint64_t kPagesPerPayerChunk = kChunkBytes;

// IOVAs [iova, iova + bytes) are the file's bytes from file_offset on.
struct MappingEntry {
  uint64_t token;  // RowRecord::token of whose it is; 0: free
  uint64_t iova;
  uint64_t bytes;
  uint64_t device;
  uint64_t inode;
  uint64_t file_offset;
  uint32_t access;  // 1 read, 2 write, 3 both
  uint32_t reserved;
  uint64_t reserved2;
};
inline constexpr uint64_t kMappingsPerChunk = kChunkBytes / sizeof(MappingEntry);

struct SegmentHeader {
  uint32_t magic;
  uint32_t kind;
  uint32_t file;   // index of its FileRecord; 0 in mapping segments
  uint32_t row;    // hold and mapping segments; 0 in payer segments
  uint64_t pages;  // that there is room for; or mappings
  uint64_t chunks;
  uint64_t data;   // offset of the first chunk from the segment's start
  uint64_t bytes;  // of the segment in all
  uint8_t reserved[16];
};

// What the fields of a segment header must be for this many pages; also how much space it takes.
struct SegmentGeometry {
  uint64_t chunks;
  uint64_t data;
  uint64_t bytes;
};
// REQUIRES: 0 < pages <= kMaxPagesPerFile.
constexpr SegmentGeometry GeometryOf(uint32_t kind, uint64_t pages) {
  const uint64_t per_chunk = kind == kHoldSegment    ? kPagesPerHoldChunk
                             : kind == kPayerSegment ? kPagesPerPayerChunk
                                                     : kMappingsPerChunk;
  const uint64_t chunks = (pages + per_chunk - 1) / per_chunk;
  const uint64_t head = sizeof(SegmentHeader) + (chunks + 63) / 64 * sizeof(uint64_t);
  const uint64_t data = (head + kAlignment - 1) / kAlignment * kAlignment;
  return {chunks, data, data + chunks * kChunkBytes};
}

static_assert(sizeof(LedgerHeader) == 4096 && kRowTable == sizeof(LedgerHeader));
static_assert(offsetof(LedgerHeader, vm_uuid) == 56);
static_assert(offsetof(LedgerHeader, lock) == 128);
static_assert(offsetof(LedgerHeader, sequence) == 192);
static_assert(offsetof(LedgerHeader, end) == 200);
static_assert(offsetof(LedgerHeader, file_count) == 224);
static_assert(sizeof(RowRecord) == 320);
static_assert(offsetof(LedgerHeader, next_layout) == 248);
static_assert(offsetof(RowRecord, name) == 32);
static_assert(offsetof(RowRecord, flags) == 104);
static_assert(offsetof(RowRecord, mapping_segment) == 112);
static_assert(offsetof(RowRecord, mapped_pages) == 128);
static_assert(offsetof(RowRecord, changes) == 192);
static_assert(offsetof(RowRecord, token) == 216);
static_assert(offsetof(RowRecord, cache_map_calls) == 256);
static_assert(kFileTable == kRowTable + kMaxRows * sizeof(RowRecord));
static_assert(sizeof(FileRecord) == 1024);
static_assert(offsetof(FileRecord, layout) == 40);
static_assert(offsetof(FileRecord, hold_segment) == 64);
static_assert(kSegments == kFileTable + kMaxFiles * sizeof(FileRecord));
static_assert(kSegments % kAlignment == 0);
static_assert(sizeof(SegmentHeader) == 64);
static_assert(sizeof(MappingEntry) == 64 && kMaxMappings % kMappingsPerChunk == 0);
static_assert(offsetof(MappingEntry, access) == 48);
static_assert(kMaxRows <= 64, "holder_rows has one bit per row, a payer byte holds row + 1");
static_assert(sizeof(pthread_mutex_t) <= sizeof(LedgerHeader::lock));
static_assert(std::is_trivially_copyable_v<LedgerHeader> &&
              std::is_trivially_copyable_v<RowRecord> && std::is_trivially_copyable_v<FileRecord> &&
              std::is_trivially_copyable_v<MappingEntry>);
static_assert(std::atomic_ref<uint64_t>::is_always_lock_free,
              "counters are shared between processes");

constexpr bool IsRegistered(const RowRecord& row) {
  return row.state == kRowActive && (row.flags & kRowRegistered) != 0;
}

// Words that others may look at meanwhile. Relaxed: each is a fact of its own and orders nothing.
template <typename T>
inline T LoadWord(const T& word) {
  return std::atomic_ref<T>(const_cast<T&>(word)).load(std::memory_order_relaxed);
}
template <typename T>
inline void StoreWord(T& word, T value) {
  std::atomic_ref<T>(word).store(value, std::memory_order_relaxed);
}

}  // namespace mvgpu::domain::ledger_format
