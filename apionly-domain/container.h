#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include <absl/container/btree_map.h>
#include <absl/container/flat_hash_map.h>
#include <absl/container/inlined_vector.h>

#include "apionly-domain/access.h"
#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/base/mutex.h"
#include "apionly-domain/base/unique_fd.h"
#include "apionly-domain/domain.h"
#include "apionly-domain/memory/guest_file.h"

namespace mvgpu::domain {

// The container of a VM: VFIO's container. It stores the VM's mappings, pins nothing, and replays
// them to every domain that is attached, also to one attached later.
//
// Semantics are those of VFIO type1 v2 where that has an answer: overlap is refused (an identical
// re-map is accepted), an unmap removes every mapping wholly inside the range, refuses to cut one
// unless it is told to, and succeeds when nothing matches. Files are recognised by identity and
// mapped once, however many descriptors arrive.
//
// Thread-safe. Changes (map, unmap, attach, detach) come one after the other, and may wait for
// holders; totals() and mappings() never wait for that. Lock order: the change lock, then either
// the table lock or what a domain locks.
class Container {
 public:
  struct Limits {
    // Mappings that continue each other in IOVAs and in one file with the same rights count as one,
    // so a VMM that maps its RAM in small pieces does not come near. As type1's dma_entry_limit.
    // Looked at when a mapping is added or split: an unmap that takes one out of the middle of
    // several that count as one may leave one more.
    uint64_t max_mappings = 65535;
    uint64_t max_pieces = 16 * 65535;        // mappings, each for itself: bounds our own memory
    uint64_t max_mapped_bytes = UINT64_MAX;  // of mappings with a file
  };
  struct MapRequest {
    Iova iova;
    uint64_t size = 0;  // bytes, a multiple of the page size
    Access access = Access::kReadWrite;
    UniqueFd fd;               // invalid: a mapping without a file
    uint64_t file_offset = 0;  // bytes, a multiple of the page size
  };
  struct Totals {
    uint64_t mappings = 0;         // each for itself
    uint64_t merged_mappings = 0;  // as they count for Limits::max_mappings
    uint64_t mapped_pages = 0;     // all of them
    uint64_t reachable_pages = 0;  // those with a file
    uint64_t files = 0;
  };
  // What an unmap does to a mapping that lies only partly in its range.
  enum class Cut : uint8_t { kRefuse, kSplit };

  Container() : Container(Limits{}) {}
  explicit Container(Limits limits) : limits_(limits) {}
  // REQUIRES: every domain has been detached.
  ~Container();

  // Errors: kInvalid (alignment, wrap, size 0, beyond the file's end, not a regular file),
  // kOverlap, kLimit, kPermission (writable mapping of a read-only file), or what a domain
  // answered; nothing changes then.
  Result<void> map(MapRequest request);
  // Removes what is mapped in the range; returns the number of bytes unmapped, 0 when there was
  // nothing. Errors: kInvalid (alignment, wrap), kWouldSplit, kBusy (naming the holders), kLimit (a
  // split beyond it); nothing changes then.
  Result<uint64_t> unmap(Iova start, uint64_t size, Cut cut = Cut::kRefuse);
  Result<uint64_t> unmap_all();

  // The domain is told of all mappings there are. On an error it is not attached and has heard of
  // their removal again.
  Result<void> attach(Domain* domain);
  // Unmaps everything from the domain. kBusy when it still holds something; then it stays attached.
  Result<void> detach(Domain* domain);

  Totals totals() const;
  // How many files have come that the VMM may truncate (not sealed against shrinking): their pages
  // may go at any time, which costs an error then.
  uint64_t unsealed_files_seen() const { return unsealed_files_seen_.load(); }
  std::vector<Mapping> mappings() const;
  // What the mapping around an IOVA covers; nullopt where nothing is mapped. May be called with any
  // lock of a domain or of an owner of pins held.
  std::optional<IovaRange> mapping_at(Iova iova) const;

 private:
  using MappingTable = absl::btree_map<uint64_t, Mapping>;  // by first IOVA; disjoint
  using Mappings = absl::InlinedVector<Mapping, 1>;

  Result<Mapping> MappingFor(MapRequest request, IovaRange range)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(change_mutex_);
  Result<std::shared_ptr<GuestFile>> FileOf(UniqueFd fd)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(change_mutex_);
  // kOverlap or kLimit; false when the mapping is there already.
  Result<bool> CheckNew(const Mapping& mapping) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(change_mutex_);
  Result<Mappings> MappingsIn(IovaRange range, Cut cut) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(change_mutex_);
  Result<uint64_t> Unmap(const Mappings& going) ABSL_EXCLUSIVE_LOCKS_REQUIRED(change_mutex_);
  void AddToTable(Mapping mapping) ABSL_EXCLUSIVE_LOCKS_REQUIRED(change_mutex_);
  void RemoveFromTable(const Mapping& going) ABSL_EXCLUSIVE_LOCKS_REQUIRED(change_mutex_);
  // How many of the two neighbours a mapping goes together with. `next`: the first mapping behind.
  uint64_t NeighboursLocked(const Mapping& mapping, MappingTable::const_iterator next) const
      ABSL_SHARED_LOCKS_REQUIRED(table_mutex_);

  const Limits limits_;
  ExclusiveMutex change_mutex_;
  // In the order in which they hear of changes, see Domain.
  std::vector<Domain*> domains_ ABSL_GUARDED_BY(change_mutex_);
  absl::flat_hash_map<FileIdentity, std::weak_ptr<GuestFile>> files_ ABSL_GUARDED_BY(change_mutex_);

  std::atomic<uint64_t> unsealed_files_seen_{0};

  mutable Mutex table_mutex_;  // written with the change lock held too
  MappingTable mappings_ ABSL_GUARDED_BY(table_mutex_);
  Totals totals_ ABSL_GUARDED_BY(table_mutex_);
};

}  // namespace mvgpu::domain
