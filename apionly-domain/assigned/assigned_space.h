#pragma once

// The addresses that an assigned device sees: one IOMMU, and who has which of its IOVAs. Some are
// wished for (an assigned-device domain maps guest memory where the VMM says), others are handed
// out (a mapper only needs any address).
//
// Ranges go in any cut. An IOMMU under VFIO lets a mapping go only as a whole, so a cut takes the
// whole away and maps what is left again, at the same IOVAs: what was to go is out of reach at
// once, and the rest is out of reach for that moment, in which a device that is busy there faults.
// Users whose devices cannot live with that ask for a mapping per page. If the rest cannot be
// mapped again (the limit of mappings), it stays out of reach, is counted as lost, and is not shown
// by shows(): the device faults; it never reaches what it may not.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include <absl/container/btree_map.h>

#include "apionly-domain/access.h"
#include "apionly-domain/assigned/assigned_iommu.h"
#include "apionly-domain/assigned/iova_allocator.h"
#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/base/mutex.h"

namespace mvgpu::domain {

// Thread-safe. Its lock is taken last, system calls happen under it.
class AssignedSpace {
 public:
  struct Options {
    // Where IOVAs are handed out first, see IovaAllocator. 0 leaves low addresses to guest memory.
    Iova prefer_below = IovaAllocator::kBelow4G;
    bool maps_each_page = false;  // slower, and more mappings: for devices that may not fault
  };
  struct HostRun {
    std::byte* host;
    uint64_t size;  // bytes, whole pages
  };
  struct Counters {
    uint64_t mapped_pages = 0;  // now
    uint64_t mappings = 0;      // now, of the IOMMU
    uint64_t lost_pages = 0;    // now
    uint64_t cuts = 0;          // since creation: mappings that went and came again in part
  };

  AssignedSpace(std::unique_ptr<AssignedIommu> iommu, Options options);
  // REQUIRES: everything is unmapped.
  ~AssignedSpace();

  // Shows the runs to the device in a row, at IOVAs that nobody has, such that the longest of them
  // keeps its large pages if there is such a place. Errors: kLimit (also: no room
  // for all of them in one piece), those of AssignedIommu::map(); nothing is mapped then.
  Result<IovaRange> map(std::span<const HostRun> runs, Access access);
  // The same at given IOVAs. Also kOverlap, kNotReachable as IovaAllocator::reserve().
  Result<void> map_at(IovaRange iova, std::byte* host, Access access);
  // Makes sure that an unmap of the range cuts nothing. Errors: those of AssignedIommu::map(); all
  // is mapped as before then, or, where that too is impossible, lost.
  Result<void> isolate(IovaRange iova);
  // The device does not reach the range any more, except through what its IOMMU remembers. The
  // IOVAs stay taken until the next flush(). REQUIRES: all of it was mapped here.
  void unmap(IovaRange iova);
  // From now on no device reaches what was unmapped before; its IOVAs may be handed out again.
  void flush();
  // Both, in one go.
  void unmap_and_flush(IovaRange iova);

  // What isolate() of the range takes away for a moment: it, and the mappings of the IOMMU that it
  // cuts.
  IovaRange cut_hull(IovaRange iova) const;
  // The pages of the range that the device sees, in order.
  std::vector<PageRun> shown_pages(IovaRange iova) const;
  // Whether the range shows the host memory from `host` on.
  bool shows(IovaRange iova, const std::byte* host) const;
  Counters counters() const;
  std::string_view iommu_name() const { return iommu_->name(); }
  // As AssignedIommu says.
  bool holds_memory() const { return iommu_->holds_memory(); }

 private:
  // One mapping of the IOMMU.
  struct Piece {
    PageRun pages;
    std::byte* host;
    Access access;
    // The part of it in `part`. REQUIRES: pages contains it.
    Piece slice(PageRun part) const {
      return {part, host + BytesIn(part.first - pages.first), access};
    }
  };
  using Pieces = absl::btree_map<uint64_t, Piece>;  // by first page

  Result<void> MapLocked(const Piece& whole) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  Result<void> MapPieceLocked(const Piece& piece) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  Pieces::iterator UnmapPieceLocked(Pieces::iterator it) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Takes the pages away, maps again what is left of the pieces that they cut.
  void RemoveLocked(PageRun pages) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  Result<void> SplitAtLocked(uint64_t page) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void UnmapLocked(IovaRange iova) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void FlushLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  Pieces::const_iterator FirstOverlapLocked(PageRun pages) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const bool maps_each_page_;
  mutable ExclusiveMutex mutex_;
  const std::unique_ptr<AssignedIommu> iommu_;  // locks itself, but changes only with mutex_ held
  IovaAllocator iovas_ ABSL_GUARDED_BY(mutex_);
  Pieces pieces_ ABSL_GUARDED_BY(mutex_);
  std::vector<IovaRange> unflushed_ ABSL_GUARDED_BY(mutex_);  // unmapped, still taken
  uint64_t taken_pages_ ABSL_GUARDED_BY(mutex_) = 0;          // mapped or lost
  Counters counters_ ABSL_GUARDED_BY(mutex_);                 // without lost_pages and mappings
};

}  // namespace mvgpu::domain
