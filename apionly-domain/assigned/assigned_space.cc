#include "apionly-domain/assigned/assigned_space.h"

#include <algorithm>
#include <bit>
#include <iterator>
#include <utility>

namespace mvgpu::domain {

namespace {

// What would lie in front of the longest run if all of the row were host memory: where the row is
// congruent to that, this run's large pages stay large, wherever in the row it is.
const std::byte* StartForLongest(std::span<const AssignedSpace::HostRun> runs) {
  const AssignedSpace::HostRun* longest = &runs.front();
  uint64_t before = 0;  // bytes in front of the run, and of the longest
  uint64_t before_longest = 0;
  for (const AssignedSpace::HostRun& run : runs) {
    if (run.size > longest->size) {
      longest = &run;
      before_longest = before;
    }
    before += run.size;
  }
  return std::bit_cast<const std::byte*>(std::bit_cast<uint64_t>(longest->host) - before_longest);
}

}  // namespace

AssignedSpace::AssignedSpace(std::unique_ptr<AssignedIommu> iommu, Options options)
    : maps_each_page_(options.maps_each_page),
      iommu_(std::move(iommu)),
      iovas_(iommu_->usable_ranges(), iommu_->page_sizes(), options.prefer_below) {}

AssignedSpace::~AssignedSpace() {
  MutexLock lock(mutex_);
  MVGPU_CHECK(pieces_.empty() && taken_pages_ == 0);
}

Result<IovaRange> AssignedSpace::map(std::span<const HostRun> runs, Access access) {
  uint64_t size = 0;
  for (const HostRun& run : runs) size += run.size;
  const std::byte* const host = StartForLongest(runs);
  MutexLock lock(mutex_);
  auto range = iovas_.allocate(size, host);
  if (!range && !unflushed_.empty()) {
    FlushLocked();
    range = iovas_.allocate(size, host);
  }
  if (!range) return range;
  uint64_t page = range->start().page();
  for (const HostRun& run : runs) {
    if (auto done = MapLocked({{page, PagesIn(run.size)}, run.host, access}); !done) {
      RemoveLocked(PagesOf(*range));
      unflushed_.push_back(*range);
      return tl::unexpected<Error>(std::move(done).error());
    }
    page += PagesIn(run.size);
  }
  taken_pages_ += PagesIn(size);
  return range;
}

Result<void> AssignedSpace::map_at(IovaRange iova, std::byte* host, Access access) {
  MutexLock lock(mutex_);
  auto reserved = iovas_.reserve(iova);
  if (!reserved && !unflushed_.empty()) {
    FlushLocked();
    reserved = iovas_.reserve(iova);
  }
  MVGPU_RETURN_IF_ERROR(std::move(reserved));
  if (auto done = MapLocked({PagesOf(iova), host, access}); !done) {
    RemoveLocked(PagesOf(iova));
    unflushed_.push_back(iova);
    return done;
  }
  taken_pages_ += PagesIn(iova.size());
  return {};
}

Result<void> AssignedSpace::MapLocked(const Piece& whole) {
  const uint64_t step = maps_each_page_ ? 1 : whole.pages.count;
  for (uint64_t at = whole.pages.first; at < whole.pages.end(); at += step) {
    MVGPU_RETURN_IF_ERROR(MapPieceLocked(whole.slice({at, step})));
  }
  return {};
}

Result<void> AssignedSpace::MapPieceLocked(const Piece& piece) {
  MVGPU_RETURN_IF_ERROR(iommu_->map(RangeOf(piece.pages), piece.host, piece.access));
  pieces_.emplace(piece.pages.first, piece);
  counters_.mapped_pages += piece.pages.count;
  return {};
}

AssignedSpace::Pieces::iterator AssignedSpace::UnmapPieceLocked(Pieces::iterator it) {
  // A device that may still reach memory which is to be taken away is not to be lived with: if this
  // fails, the process ends, and the kernel takes its mappings away.
  MVGPU_CHECK(iommu_->unmap(RangeOf(it->second.pages)).has_value());
  counters_.mapped_pages -= it->second.pages.count;
  return pieces_.erase(it);
}

void AssignedSpace::unmap(IovaRange iova) {
  MutexLock lock(mutex_);
  UnmapLocked(iova);
}

void AssignedSpace::unmap_and_flush(IovaRange iova) {
  MutexLock lock(mutex_);
  UnmapLocked(iova);
  FlushLocked();
}

void AssignedSpace::UnmapLocked(IovaRange iova) {
  RemoveLocked(PagesOf(iova));
  taken_pages_ -= PagesIn(iova.size());
  unflushed_.push_back(iova);
}

void AssignedSpace::RemoveLocked(PageRun pages) {
  std::vector<Piece> rest;
  const auto first = FirstOverlapLocked(pages);
  if (first == pieces_.end()) return;
  auto it = pieces_.find(first->first);
  while (it != pieces_.end() && it->first < pages.end()) {
    const Piece piece = it->second;
    it = UnmapPieceLocked(it);
    const PageRun whole = piece.pages;
    if (whole.first < pages.first) {
      rest.push_back(piece.slice({whole.first, pages.first - whole.first}));
    }
    if (whole.end() > pages.end()) {
      rest.push_back(piece.slice({pages.end(), whole.end() - pages.end()}));
    }
    if (whole.first < pages.first || whole.end() > pages.end()) ++counters_.cuts;
  }
  // One that cannot be mapped again is lost, see above.
  for (const Piece& piece : rest) static_cast<void>(MapPieceLocked(piece));
}

Result<void> AssignedSpace::isolate(IovaRange iova) {
  const PageRun pages = PagesOf(iova);
  MutexLock lock(mutex_);
  MVGPU_RETURN_IF_ERROR(SplitAtLocked(pages.first));
  return SplitAtLocked(pages.end());
}

Result<void> AssignedSpace::SplitAtLocked(uint64_t page) {
  const auto found = FirstOverlapLocked({page, 1});
  if (found == pieces_.end() || found->first >= page) return {};
  const Piece whole = found->second;
  UnmapPieceLocked(pieces_.find(whole.pages.first));
  ++counters_.cuts;
  auto done = MapPieceLocked(whole.slice({whole.pages.first, page - whole.pages.first}));
  if (done) done = MapPieceLocked(whole.slice({page, whole.pages.end() - page}));
  if (done) return {};
  if (const auto head = pieces_.find(whole.pages.first); head != pieces_.end()) {
    UnmapPieceLocked(head);
  }
  static_cast<void>(MapPieceLocked(whole));  // as before, or lost
  return done;
}

IovaRange AssignedSpace::cut_hull(IovaRange iova) const {
  const PageRun pages = PagesOf(iova);
  MutexLock lock(mutex_);
  uint64_t first = pages.first;
  uint64_t end = pages.end();
  for (auto it = FirstOverlapLocked(pages); it != pieces_.end() && it->first < pages.end(); ++it) {
    first = std::min(first, it->first);
    end = std::max(end, it->second.pages.end());
  }
  return RangeOf({first, end - first});
}

std::vector<PageRun> AssignedSpace::shown_pages(IovaRange iova) const {
  const PageRun pages = PagesOf(iova);
  std::vector<PageRun> shown;
  MutexLock lock(mutex_);
  for (auto it = FirstOverlapLocked(pages); it != pieces_.end() && it->first < pages.end(); ++it) {
    const uint64_t first = std::max(it->first, pages.first);
    shown.push_back({first, std::min(it->second.pages.end(), pages.end()) - first});
  }
  return shown;
}

void AssignedSpace::flush() {
  MutexLock lock(mutex_);
  FlushLocked();
}

void AssignedSpace::FlushLocked() {
  iommu_->flush();
  for (const IovaRange& range : unflushed_) iovas_.free(range);
  unflushed_.clear();
}

AssignedSpace::Pieces::const_iterator AssignedSpace::FirstOverlapLocked(PageRun pages) const {
  auto it = pieces_.upper_bound(pages.first);
  if (it != pieces_.begin() && std::prev(it)->second.pages.contains(pages.first))
    return std::prev(it);
  return it != pieces_.end() && it->first < pages.end() ? it : pieces_.end();
}

bool AssignedSpace::shows(IovaRange iova, const std::byte* host) const {
  const PageRun pages = PagesOf(iova);
  MutexLock lock(mutex_);
  uint64_t page = pages.first;
  for (auto it = FirstOverlapLocked(pages); it != pieces_.end() && page < pages.end(); ++it) {
    const Piece& piece = it->second;
    if (!piece.pages.contains(page)) return false;
    if (piece.host + BytesIn(page - piece.pages.first) != host + BytesIn(page - pages.first)) {
      return false;
    }
    page = piece.pages.end();
  }
  return page >= pages.end();
}

AssignedSpace::Counters AssignedSpace::counters() const {
  MutexLock lock(mutex_);
  Counters counters = counters_;
  counters.mappings = pieces_.size();
  counters.lost_pages = taken_pages_ - counters.mapped_pages;
  return counters;
}

}  // namespace mvgpu::domain
