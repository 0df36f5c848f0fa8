#pragma once

#include <memory>
#include <vector>

#include "apionly-domain/pin/area_budget.h"
#include "apionly-domain/pin/area_pin_backend.h"
#include "apionly-domain/pin/memory_locker.h"

namespace mvgpu::domain {

// mlock(2) of exactly the pages that are pinned, as long as that takes few memory areas, and of
// granules around them when it takes many (AreaBudget says when and why that is enough).
//
// An area is a locked stretch that does not touch another of its kind: neighbours of which every
// page is pinned become one. A granule takes in the smaller areas that it meets. The pages of a
// granule that are not pinned are not brought in, only kept should they come in (MLOCK_ONFAULT):
// guest memory that was never touched stays unallocated. It counts as locked all the same, for the
// kernel and in locked_pages(). Where RLIMIT_MEMLOCK does not admit a granule, the exact pages are
// locked instead, if the budget has room.
//
// On hugetlbfs a granule is at least a huge page. These are only brought in and counted here: the
// kernel never moves them out, and mlock() of them would do no more.
class MlockPinBackend final : public AreaPinBackend {
 public:
  // `area_budget`: areas at a time, of all files together; at least 16.
  MlockPinBackend(uint64_t area_budget, std::unique_ptr<MemoryLocker> locker);

  std::string_view name() const override { return "mlock"; }
  uint32_t granule_pages(const GuestFile& file) const override;
  uint64_t areas() const override { return area_count(); }
  uint64_t area_budget() const override { return budget_.areas(); }

 private:
  // The tags of areas. Doubtful: the kernel refused to unlock some of it, and may have unlocked
  // other parts; it is locked again before a page of it is pinned.
  enum Kind : uint32_t { kExact, kGranules, kDoubtful };

  Result<uint64_t> Cover(const GuestFile& file, Areas& areas, Areas::iterator next,
                         PageRun gap) override;
  Result<void> Reuse(const GuestFile& file, Areas::value_type& area, PageRun pages) override;
  bool Cut(const GuestFile& file, Areas& areas, Areas::iterator area, PageRun part) override;
  void Release(const GuestFile& file, Areas& areas, Areas::iterator area) override;
  void ReleaseRefused(const GuestFile& file, const Areas& areas) override;

  Result<uint64_t> CoverExactly(const GuestFile& file, Areas& areas, Areas::iterator next,
                                PageRun gap);
  // Adds an exact area of which every page is pinned, as one with such neighbours.
  void AddMerged(Areas& areas, Areas::iterator next, PageRun run);

  // The run, extended to whole areas where it meets some.
  static PageRun HullOf(Areas& areas, PageRun run);
  static std::vector<PageRun> GapsIn(Areas& areas, PageRun hull);
  // Makes one area of the hull with its areas, and pins `gap` in it. Answers 0 or an errno.
  int LockHull(const GuestFile& file, Areas& areas, PageRun hull, PageRun gap);

  // These answer 0 or an errno.
  int Lock(const GuestFile& file, PageRun pages);
  int LockOnFault(const GuestFile& file, PageRun pages);
  int BringIn(const GuestFile& file, PageRun pages);
  int Unlock(const GuestFile& file, PageRun pages);
  // Undoes a lock that failed half-way. What the kernel refuses to unlock stays as a doubtful area.
  void UnlockOrKeep(const GuestFile& file, Areas& areas, PageRun pages);

  const AreaBudget budget_;
  const std::unique_ptr<MemoryLocker> locker_;
};

}  // namespace mvgpu::domain
