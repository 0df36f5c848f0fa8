#include "apionly-domain/pin/mlock_pin_backend.h"

#include <fmt/format.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <utility>
#include <vector>

#include "apionly-domain/base/check.h"
#include "apionly-domain/pin/pin_errors.h"

namespace mvgpu::domain {

namespace {

constexpr uint64_t kSmallestBudget = 16;
constexpr uint64_t kDefaultMaxMapCount = 65530;

// A quarter of the memory areas that the kernel allows: each lone area costs two of them, so locks
// take half at most and the rest of the process has the other half.
uint64_t DefaultAreaBudget() {
  std::ifstream file("/proc/sys/vm/max_map_count");
  uint64_t map_count = 0;
  if (!(file >> map_count)) map_count = kDefaultMaxMapCount;
  return std::max(map_count / 4, kSmallestBudget);
}

PageRun RoundedOut(PageRun run, uint64_t granule, uint64_t file_pages) {
  const uint64_t first = run.first / granule * granule;
  const uint64_t end = std::min((run.end() + granule - 1) / granule * granule, file_pages);
  return {first, end - first};
}

std::byte* AddressOf(const GuestFile& file, PageRun run) {
  return file.host_address(BytesIn(run.first));
}

bool IsHuge(const GuestFile& file) { return file.block_size() != kPageSize; }

bool IsAligned(PageRun run, uint64_t unit) {
  return run.first % unit == 0 && run.count % unit == 0;
}

}  // namespace

MlockPinBackend::MlockPinBackend(uint64_t area_budget, std::unique_ptr<MemoryLocker> locker)
    : budget_(area_budget), locker_(std::move(locker)) {
  MVGPU_CHECK(area_budget >= kSmallestBudget);
}

uint32_t MlockPinBackend::granule_pages(const GuestFile& file) const {
  const uint64_t granule =
      std::max(budget_.granule(area_count(), total_file_pages()), PagesIn(file.block_size()));
  return static_cast<uint32_t>(std::min<uint64_t>(granule, UINT32_MAX));
}

// Inline: after a system call the processor mispredicts the return of every frame around it.
[[gnu::always_inline]] inline Result<uint64_t> MlockPinBackend::CoverExactly(const GuestFile& file,
                                                                             Areas& areas,
                                                                             Areas::iterator next,
                                                                             PageRun gap) {
  if (area_count() >= budget_.areas()) {
    return Fail(ErrorCode::kLimit,
                fmt::format("cannot pin file pages {}-{}: {} separate areas are locked, as many as "
                            "a quarter of vm.max_map_count was at the start; raise that, or use "
                            "--pin=io-uring",
                            gap.first, gap.end() - 1, area_count()));
  }
  const PageRun run = RoundedOut(gap, PagesIn(file.block_size()), file.pages());
  if (const int error = Lock(file, run); error != 0) {
    UnlockOrKeep(file, areas, run);
    return tl::unexpected<Error>(MlockError(error, file, gap, run.count));
  }
  if (run == gap) {
    AddMerged(areas, next, run);
  } else {
    AddArea(areas, next, run.first, {run.count, gap.count, kExact});
  }
  return gap.count;
}

Result<uint64_t> MlockPinBackend::Cover(const GuestFile& file, Areas& areas, Areas::iterator next,
                                        PageRun gap) {
  const uint64_t granule = granule_pages(file);
  if (granule == PagesIn(file.block_size())) return CoverExactly(file, areas, next, gap);
  const PageRun hull = HullOf(areas, RoundedOut(gap, granule, file.pages()));
  const uint64_t areas_before = area_count();
  const int error = LockHull(file, areas, hull, gap);
  if (error == 0) return gap.count;
  // More areas: the kernel did not let all of it go again.
  if (area_count() == areas_before && areas_before < budget_.areas()) {
    return CoverExactly(file, areas, areas.upper_bound(gap.first), gap);
  }
  uint64_t new_pages = 0;
  for (const PageRun& part : GapsIn(areas, hull)) new_pages += part.count;
  return tl::unexpected<Error>(MlockError(error, file, gap, new_pages));
}

void MlockPinBackend::AddMerged(Areas& areas, Areas::iterator next, PageRun run) {
  const auto joins = [](const Area& area) { return area.tag == kExact && area.is_full(); };
  if (next != areas.end() && next->first == run.end() && joins(next->second)) {
    run.count += next->second.pages;
    next = RemoveArea(areas, next);
  }
  if (next != areas.begin()) {
    const auto previous = std::prev(next);
    if (RunOf(*previous).end() == run.first && joins(previous->second)) {
      GrowArea(previous, run.count);
      return;
    }
  }
  AddArea(areas, next, run.first, {run.count, run.count, kExact});
}

PageRun MlockPinBackend::HullOf(Areas& areas, PageRun run) {
  uint64_t end = run.end();
  auto area = areas.upper_bound(run.first);
  if (area != areas.begin() && RunOf(*std::prev(area)).end() > run.first) --area;
  if (area != areas.end()) run.first = std::min(run.first, area->first);
  for (; area != areas.end() && area->first < end; ++area) end = std::max(end, RunOf(*area).end());
  return {run.first, end - run.first};
}

std::vector<PageRun> MlockPinBackend::GapsIn(Areas& areas, PageRun hull) {
  std::vector<PageRun> gaps;
  uint64_t at = hull.first;
  for (auto area = areas.lower_bound(at); area != areas.end() && area->first < hull.end(); ++area) {
    if (area->first > at) gaps.push_back({at, area->first - at});
    at = RunOf(*area).end();
  }
  if (at < hull.end()) gaps.push_back({at, hull.end() - at});
  return gaps;
}

int MlockPinBackend::LockHull(const GuestFile& file, Areas& areas, PageRun hull, PageRun gap) {
  auto next = areas.lower_bound(hull.first);
  const auto absorbed = static_cast<uint64_t>(std::distance(next, areas.lower_bound(hull.end())));
  if (area_count() - absorbed >= budget_.areas()) return ENOMEM;
  int error = LockOnFault(file, hull);
  if (error == 0) error = BringIn(file, gap);
  if (error != 0) {
    for (const PageRun& part : GapsIn(areas, hull)) UnlockOrKeep(file, areas, part);
    return error;
  }
  uint64_t pinned = gap.count;
  for (uint64_t i = 0; i < absorbed; ++i) {
    pinned += next->second.pinned_pages;
    next = RemoveArea(areas, next);
  }
  AddArea(areas, next, hull.first, {hull.count, pinned, kGranules});
  return 0;
}

Result<void> MlockPinBackend::Reuse(const GuestFile& file, Areas::value_type& area, PageRun pages) {
  int error = 0;
  if (area.second.tag == kDoubtful) error = LockOnFault(file, RunOf(area));
  if (error == 0) error = BringIn(file, pages);
  if (error != 0) return tl::unexpected<Error>(MlockError(error, file, pages, pages.count));
  if (area.second.tag == kDoubtful) area.second.tag = kGranules;
  return {};
}

bool MlockPinBackend::Cut(const GuestFile& file, Areas& areas, Areas::iterator area, PageRun part) {
  if (!budget_.allows_cut(area_count()) || !IsAligned(part, PagesIn(file.block_size())))
    return false;
  if (Unlock(file, part) != 0) {
    area->second.tag = kDoubtful;
    return false;
  }
  SplitArea(areas, area, part, area->second.tag, area->second.tag);
  return true;
}

void MlockPinBackend::Release(const GuestFile& file, Areas& areas, Areas::iterator area) {
  if (Unlock(file, RunOf(*area)) == 0) {
    RemoveArea(areas, area);
  } else {
    area->second.tag = kDoubtful;
  }
}

void MlockPinBackend::ReleaseRefused(const GuestFile& file, const Areas&) {
  // All of the file: that splits nothing, so it cannot be refused for want of memory areas.
  Unlock(file, {0, file.pages()});
}

int MlockPinBackend::Lock(const GuestFile& file, PageRun pages) {
  if (IsHuge(file)) return BringIn(file, pages);
  return locker_->lock(AddressOf(file, pages), BytesIn(pages.count));
}

int MlockPinBackend::LockOnFault(const GuestFile& file, PageRun pages) {
  return IsHuge(file) ? 0 : locker_->lock_on_fault(AddressOf(file, pages), BytesIn(pages.count));
}

int MlockPinBackend::BringIn(const GuestFile& file, PageRun pages) {
  return locker_->bring_in(AddressOf(file, pages), BytesIn(pages.count));
}

int MlockPinBackend::Unlock(const GuestFile& file, PageRun pages) {
  return IsHuge(file) ? 0 : locker_->unlock(AddressOf(file, pages), BytesIn(pages.count));
}

void MlockPinBackend::UnlockOrKeep(const GuestFile& file, Areas& areas, PageRun pages) {
  if (Unlock(file, pages) != 0) {
    AddArea(areas, areas.upper_bound(pages.first), pages.first, {pages.count, 0, kDoubtful});
  }
}

std::unique_ptr<PinBackend> MakeMlockPinBackend() {
  return std::make_unique<MlockPinBackend>(DefaultAreaBudget(), MakeKernelMemoryLocker());
}

}  // namespace mvgpu::domain
