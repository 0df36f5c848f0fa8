#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <absl/container/btree_map.h>
#include <absl/container/flat_hash_map.h>

#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/base/mutex.h"
#include "apionly-domain/base/unique_fd.h"
#include "apionly-domain/memory/guest_file.h"

namespace mvgpu::domain {

// What the device may do with a mapping; also what an access wants to do.
enum class Access : uint8_t { kRead = 1, kWrite = 2, kReadWrite = 3 };
constexpr bool Allows(Access granted, Access wanted) {
  return (static_cast<uint8_t>(wanted) & ~static_cast<uint8_t>(granted)) == 0;
}

// One stored translation: IOVAs that the VMM gave a meaning. Without a file (ROM, anonymous RAM,
// BARs of other devices) it is known but cannot be reached by pointer.
struct Mapping {
  IovaRange iova;
  Access access;
  std::shared_ptr<GuestFile> file;  // null: no file
  uint64_t file_offset = 0;         // bytes; of the first IOVA

  // File offset of an IOVA. REQUIRES: iova.contains(address), file.
  uint64_t offset_of(Iova address) const { return file_offset + (address - iova.start()); }
  uint64_t pages() const { return PagesIn(iova.size()); }
};

// A domain hears of every mapping of its container: what is there when it attaches, then each
// change. Called with the container's lock held: an implementation must not call back into the
// container.
class Domain {
 public:
  virtual ~Domain() = default;
  virtual std::string_view name() const = 0;
  virtual Result<void> on_map(const Mapping& mapping) = 0;
  // Everything that is held in the range has been let go when this returns; kBusy, naming the
  // holders, when a holder does not let go. Called before the mappings wholly inside `range` go.
  virtual Result<void> on_unmap(IovaRange range) = 0;
  // After on_unmap() of every domain succeeded (`unmapped`), or one refused: the range is usable
  // again.
  virtual void on_unmap_done(IovaRange range, bool unmapped) = 0;
};

// The container of a VM: VFIO's container. It stores the VM's mappings, pins nothing, and replays
// them to every domain that is attached, also to one attached later.
//
// Semantics are those of VFIO type1 v2 where that has an answer: overlap is refused (an identical
// re-map is accepted), an unmap removes every mapping wholly inside the range, refuses to cut one,
// and succeeds when nothing matches. Files are recognised by identity and mapped once, however many
// descriptors arrive.
//
// Thread-safe. Lock order: this lock, then a domain's.
class Container {
 public:
  struct Limits {
    uint64_t max_mappings = 65535;  // as type1's dma_entry_limit
  };
  struct MapRequest {
    Iova iova;
    uint64_t size = 0;  // bytes, a multiple of the page size
    Access access = Access::kReadWrite;
    UniqueFd fd;               // invalid: a mapping without a file
    uint64_t file_offset = 0;  // bytes, a multiple of the page size
  };
  struct Totals {
    uint64_t mappings = 0;
    uint64_t mapped_pages = 0;     // all of them
    uint64_t reachable_pages = 0;  // those with a file
    uint64_t files = 0;
  };

  Container() : Container(Limits{}) {}
  explicit Container(Limits limits) : limits_(limits) {}
  // REQUIRES: every domain has been detached.
  ~Container();

  // Errors: kInvalid (alignment, wrap, size 0, beyond the file's end, not a regular file),
  // kOverlap, kLimit, kPermission (writable mapping of a read-only file), or what a domain
  // answered; nothing changes then.
  Result<void> map(MapRequest request);
  // Removes all mappings wholly inside; returns the number of bytes unmapped, 0 when there was
  // nothing. Errors: kInvalid (alignment, wrap), kWouldSplit, kBusy; nothing changes then.
  Result<uint64_t> unmap(Iova start, uint64_t size);
  Result<uint64_t> unmap_all();

  // The domain is told of all mappings there are. On an error it is not attached and has heard of
  // their removal again.
  Result<void> attach(Domain* domain);
  // Unmaps everything from the domain. kBusy when it still holds something; then it stays attached.
  Result<void> detach(Domain* domain);

  Totals totals() const;
  std::vector<Mapping> mappings() const;

 private:
  using MappingTable = absl::btree_map<uint64_t, Mapping>;  // by first IOVA; disjoint

  Result<std::shared_ptr<GuestFile>> FileOfLocked(UniqueFd fd)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  Result<uint64_t> UnmapLocked(std::optional<IovaRange> range)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Makes the domains let go of the ranges; either all did, or all go on as if nothing had been
  // asked.
  Result<void> RevokeLocked(const std::vector<IovaRange>& ranges,
                            const std::vector<Domain*>& domains)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  const Mapping* FirstOverlapLocked(IovaRange range) const ABSL_SHARED_LOCKS_REQUIRED(mutex_);

  const Limits limits_;
  mutable Mutex mutex_;
  MappingTable mappings_ ABSL_GUARDED_BY(mutex_);
  absl::flat_hash_map<FileIdentity, std::weak_ptr<GuestFile>> files_ ABSL_GUARDED_BY(mutex_);
  std::vector<Domain*> domains_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace mvgpu::domain
