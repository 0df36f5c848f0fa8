#pragma once

// A domain that follows page tables in guest memory: nested translation in software. Where an
// assigned device's IOMMU walks two tables, here the guest's is read when the guest says that it
// changed something, and what it says is pinned and mapped (the idea of the "software nested"
// iommu_domain, linux-s390, February 2022; QEMU does the same for s390 with a call of VFIO for each
// page).
//
// It is made with guest memory (an ApiOnlyDomain, whose IOVAs are guest-physical addresses), a
// walker for the tables' format and the root that the guest gave. There is no map() and no unmap():
//
//   refresh(range)   makes pins and mappings equal to what the tables say about that range
//
// Invariants
//   - A page is mapped in the target iff its word stands in the shadow; then it is pinned once for
//     each IOVA page that shows it, and takes a credit for each. To map is pin, then target; to
//     unmap is target, then pin: the device never reaches what is not pinned.
//   - Pages that are mapped as the tables say are not touched: a refresh of what did not change
//     reads tables and compares.
//   - A refresh makes what it found at the time it read; tables that change meanwhile are the
//     guest's to refresh again. Each refresh leaves pages out where the tables end in nothing, so
//     that holes at any level, also new ones, unmap what was there.
//   - What cannot be had is left out and reported; nothing that was done before is undone, and the
//     next refresh goes on from there.
//
// The VMM may take guest memory away (PinOwner::on_revoke): then what was mapped there goes, target
// first. A later refresh maps what the VMM has put there since.

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include <tl/expected.hpp>

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/base/mutex.h"
#include "apionly-domain/nested/map_credits.h"
#include "apionly-domain/nested/nested_target.h"
#include "apionly-domain/nested/shadow_table.h"
#include "apionly-domain/nested/table_walker.h"

namespace mvgpu::domain {

// How far a refresh came.
struct Refreshed {
  enum class End : uint8_t {
    kDone,
    kStepLimit,    // there is more to look at than was allowed
    kNoCredits,    // some pages could not be mapped; everything else was done
    kFault,        // the tables are wrong; see `fault`
    kNotMappable,  // a page could not be pinned or mapped; see `error`
  };
  End end = End::kDone;
  // Unless kDone: where to go on. Every page of the range before this one is as the tables say, but
  // for pages that lacked a credit when it ended at the step limit.
  Iova next;
  bool lacked_credits = false;
  std::optional<Fault> fault;   // with OnFault::kSkip the first one that was skipped
  std::optional<Error> error;   // the same
  uint64_t mapped_pages = 0;    // that were not, or otherwise
  uint64_t unmapped_pages = 0;  // the latter included
  uint64_t left_out_pages = 0;  // with OnFault::kSkip; where tables are wrong, all of the span
  uint64_t steps = 0;           // tables, holes, and pages left out one by one
};

// Thread-safe. Refreshes come one after the other. Lock order: the change lock of the guest
// memory's container, this one's, then the pin lock and what the target locks. Tables are read
// without the lock that on_revoke() waits for.
class NestedDomain final : public PinOwner {
 public:
  // What an architecture wants when tables are wrong or a page cannot be had: s390 stops, with an
  // error for the function; elsewhere such pages are not mapped, and the device that uses one hears
  // of it.
  enum class OnFault : uint8_t { kStop, kSkip };
  struct Options {
    std::string name = "nested";
    uint64_t root = 0;   // as the walker takes it
    IovaRange aperture;  // whole pages; nothing outside is looked at or mapped
    OnFault on_fault = OnFault::kStop;
  };
  struct Parts {  // all outlive the domain
    ApiOnlyDomain* guest;
    const TableWalker* walker;
    NestedTarget* target;
    MapCredits* credits;
  };
  struct Counters {
    uint64_t mapped_pages = 0;   // now; as many pins, and credits
    uint64_t maps = 0;           // calls of the target
    uint64_t unmaps = 0;         // the same
    uint64_t revoked_pages = 0;  // unmapped because the VMM took the memory away
  };

  NestedDomain(Options options, Parts parts);
  // Unmaps and unpins everything. REQUIRES: no unmap of the guest's memory is under way.
  ~NestedDomain() override;

  // In at most max_steps steps, each of a table's part, a large page's or a hole. The range need
  // not be aligned: every page that it touches.
  Refreshed refresh(IovaRange range, uint64_t max_steps = UINT64_MAX);
  Refreshed refresh_all(uint64_t max_steps = UINT64_MAX) {
    return refresh(options_.aperture, max_steps);
  }
  // Unmaps and unpins everything. The tables still say what they said: refresh_all() brings it
  // back.
  void clear();

  // What the device reaches at an address. kNotPresent, kNoRead, kNoWrite.
  tl::expected<GuestPhys, FaultCode> translate(Iova iova, Access access) const;

  const IovaRange& aperture() const { return options_.aperture; }
  Counters counters() const;

  std::string_view pin_owner_name() const override { return options_.name; }
  void on_revoke(IovaRange guest_memory) override;

 private:
  using Chunk = ShadowTable::Chunk;
  using Words = std::array<PageWord, ShadowTable::kChunkPages>;
  struct Pass {
    std::optional<uint64_t> starved;  // the first page for which there was no credit
    uint64_t freed = 0;               // credits that came back
  };

  bool RunPass(PageRun pages, uint64_t max_steps, Pass* pass, Refreshed* result)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(refresh_mutex_);
  // Looks at the first pages of the run; returns how many it dealt with.
  uint64_t RefreshPart(PageRun pages, Pass* pass, Refreshed* result)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(refresh_mutex_);
  // One chunk's pages from `first` on are to be these. False when that ends the refresh.
  bool ApplyLocked(uint64_t first, std::span<const PageWord> words, Pass* pass, Refreshed* result)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  bool MapMissingLocked(uint64_t first, std::span<const PageWord> words, Chunk* chunk, Pass* pass,
                        Refreshed* result) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Maps the run, `word` and what follows it, up to the first page that cannot be had; returns how
  // many pages that are.
  uint64_t MapRunLocked(PageRun iova, PageWord word, Chunk* chunk, std::optional<Error>* error)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  Result<void> MapPieceLocked(PageRun iova, PageWord word, Chunk* chunk)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Takes out what is mapped in the run, or, in a chunk, what going(index) says. How many pages.
  uint64_t TakeOutLocked(PageRun iova) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  template <typename Going>
  uint64_t TakeOutOfChunkLocked(uint64_t number, Chunk* chunk, PageRun indexes, const Going& going)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void ReleasePinsLocked(std::span<const PageWord> words) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const Options options_;
  const Parts parts_;
  const std::unique_ptr<PinContext> context_;

  Mutex refresh_mutex_ ABSL_ACQUIRED_BEFORE(mutex_);
  Words words_ ABSL_GUARDED_BY(refresh_mutex_);  // what the tables say about the part at hand

  mutable Mutex mutex_;
  ShadowTable shadow_ ABSL_GUARDED_BY(mutex_);
  Counters counters_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace mvgpu::domain
