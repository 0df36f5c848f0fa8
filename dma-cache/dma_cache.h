#pragma once

// The cache from guest page to dma_addr_t: "cache GPA to whatever dma_addr_t is returned by
// dma_map_page" (K. Tian, qemu-devel, May 2016), with the pin that keeps the page there.
//
//   map()     pages that are cached are hits: only their count of users grows. The others are
//   pinned in the
//             domain and given to the mapper, in runs. The caller gets a DmaMapping.
//   release   the last user of a page unmaps it from the device first, then lets go of its pin.
//   revoke    the VMM takes the memory away: the pages go at once, whoever uses them, in the order
//   device
//             mapping, then pin. A DmaMapping that covered them says kRevoked from then on, and its
//             release does nothing for those pages, also when they were mapped anew meanwhile: each
//             mapper call has a generation, which its DmaMappings carry.
//
// Invariants: a page is in exactly one entry iff it has users; the mapper maps it once between
// first and last use. Costs follow runs: an entry is what one mapper call returned, cut only when a
// part of it goes.
//
// Where to read next: mapper.h (what stands in for dma_map_page).

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include <absl/container/btree_map.h>

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/base/mutex.h"
#include "apionly-domain/pin/run_counter.h"
#include "dma-cache/mapper.h"

namespace mvgpu::dma {

class DmaCache;

// Who moves the data: a device that reads guest memory, writes it, or both (the kernel's
// DMA_TO_DEVICE, DMA_FROM_DEVICE, DMA_BIDIRECTIONAL).
enum class Direction : uint8_t { kToDevice, kFromDevice, kBidirectional };

// Contiguous IOVAs with a contiguous device address.
struct DmaRun {
  IovaRange iova;           // whole pages
  DmaAddr address;          // of iova.start()
  uint64_t generation = 0;  // of the mapper call behind it
};

// One use of a range of guest memory by a device. Move-only; the destructor gives the use up.
// Not thread-safe itself.
class DmaMapping {
 public:
  DmaMapping() = default;
  DmaMapping(DmaMapping&& other) noexcept;
  DmaMapping& operator=(DmaMapping&& other) noexcept;
  DmaMapping(const DmaMapping&) = delete;
  DmaMapping& operator=(const DmaMapping&) = delete;
  ~DmaMapping() { reset(); }

  std::span<const DmaRun> runs() const { return runs_; }  // in ascending IOVA order, without gaps
  bool empty() const { return runs_.empty(); }

  // False once any page of it was revoked.
  bool is_valid() const;
  // Copies guest bytes out. Errors: kInvalid (outside the mapping), kRevoked, kTruncated.
  Result<void> read(Iova iova, std::span<std::byte> destination) const;
  void reset();

 private:
  friend class DmaCache;
  DmaMapping(DmaCache* cache, std::vector<DmaRun> runs) : cache_(cache), runs_(std::move(runs)) {}

  DmaCache* cache_ = nullptr;  // outlives all its mappings: checked in its destructor
  std::vector<DmaRun> runs_;
};

// Thread-safe. Lock order: this lock, then the domain's.
class DmaCache final : public domain::PinOwner {
 public:
  struct Counters {
    uint64_t map_calls = 0;       // successful map() calls
    uint64_t hit_pages = 0;       // pages that were there already
    uint64_t miss_pages = 0;      // pages that were pinned and mapped
    uint64_t unmapped_pages = 0;  // pages given back to the mapper, revoked ones included
    uint64_t revoked_pages = 0;
    uint64_t cached_pages = 0;  // now
    uint64_t entries = 0;       // now; runs of cached pages
  };

  // Both must outlive the cache.
  DmaCache(domain::ApiOnlyDomain* domain, Mapper* mapper);
  // REQUIRES: no DmaMapping is left.
  ~DmaCache() override;

  // `range` need not be page-aligned; whole pages are mapped. Errors: those of ApiOnlyDomain::pin()
  // and Mapper::map(); nothing changes then.
  Result<DmaMapping> map(IovaRange range, Direction direction);

  Counters counters() const;

  std::string_view pin_owner_name() const override { return "dma-cache"; }
  void on_revoke(IovaRange range) override;

 private:
  friend class DmaMapping;

  // What one mapper call returned, or a part of it that is left. Key: first IOVA page.
  struct Entry {
    uint64_t pages = 0;
    DmaAddr address;
    uint64_t generation = 0;
    domain::PinnedRange pin;  // exactly one run, of these pages
  };
  using Entries = absl::btree_map<uint64_t, Entry>;

  Entries::iterator FirstOverlapLocked(PageRun pages) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  const Entry* FindLocked(uint64_t page) const ABSL_SHARED_LOCKS_REQUIRED(mutex_);
  // Pins and maps pages that are not cached; they have no users yet.
  Result<void> FillLocked(PageRun gap, Direction direction) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Makes `page` the start of an entry if it lies inside one.
  void SplitAtLocked(uint64_t page) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Unmaps the cached pages of the run, then lets go of their pins.
  void DropLocked(PageRun pages) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  std::vector<DmaRun> RunsOfLocked(PageRun pages) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  void release(std::span<const DmaRun> runs);
  bool is_valid(std::span<const DmaRun> runs) const;
  Result<void> read(std::span<const DmaRun> runs, Iova iova,
                    std::span<std::byte> destination) const;

  domain::ApiOnlyDomain* const domain_;
  const std::unique_ptr<domain::PinContext> pins_;  // used with mutex_ held
  Mapper* const mapper_;
  mutable Mutex mutex_;
  Entries entries_ ABSL_GUARDED_BY(mutex_);
  domain::RunCounter users_ ABSL_GUARDED_BY(mutex_);  // by IOVA page
  uint64_t next_generation_ ABSL_GUARDED_BY(mutex_) = 1;
  Counters counters_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace mvgpu::dma
