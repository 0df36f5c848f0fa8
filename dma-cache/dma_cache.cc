#include "dma-cache/dma_cache.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <utility>

namespace mvgpu::dma {

namespace {

domain::Access AccessFor(Direction direction) {
  switch (direction) {
    case Direction::kToDevice:
      return domain::Access::kRead;
    case Direction::kFromDevice:
      return domain::Access::kWrite;
    case Direction::kBidirectional:
      return domain::Access::kReadWrite;
  }
  return domain::Access::kReadWrite;
}

}  // namespace

DmaMapping::DmaMapping(DmaMapping&& other) noexcept
    : cache_(other.cache_), runs_(std::exchange(other.runs_, {})) {}

DmaMapping& DmaMapping::operator=(DmaMapping&& other) noexcept {
  if (this != &other) {
    reset();
    cache_ = other.cache_;
    runs_ = std::exchange(other.runs_, {});
  }
  return *this;
}

bool DmaMapping::is_valid() const { return !runs_.empty() && cache_->is_valid(runs_); }

Result<void> DmaMapping::read(Iova iova, std::span<std::byte> destination) const {
  if (runs_.empty()) return Fail(ErrorCode::kInvalid, "read through an empty dma mapping");
  return cache_->read(runs_, iova, destination);
}

void DmaMapping::reset() {
  if (runs_.empty()) return;
  cache_->release(runs_);
  runs_.clear();
}

DmaCache::DmaCache(domain::ApiOnlyDomain* domain, Mapper* mapper)
    : domain_(domain), pins_(domain->open_context(this)), mapper_(mapper) {}

DmaCache::~DmaCache() { MVGPU_CHECK(entries_.empty() && users_.empty()); }

Result<DmaMapping> DmaCache::map(IovaRange range, Direction direction) {
  const PageRun pages = PagesOf(range);
  MutexLock lock(mutex_);
  const std::vector<PageRun> gaps = users_.uncovered(pages);
  uint64_t missing = 0;
  for (const PageRun& gap : gaps) missing += gap.count;
  if (missing < pages.count) {
    // Cached pages may have been mapped for another direction than this one.
    MVGPU_RETURN_IF_ERROR(domain_->check(RangeOf(pages), AccessFor(direction)));
  }
  for (size_t i = 0; i < gaps.size(); ++i) {
    if (auto filled = FillLocked(gaps[i], direction); !filled) {
      for (size_t k = 0; k <= i; ++k) DropLocked(gaps[k]);
      return tl::unexpected<Error>(std::move(filled).error());
    }
  }
  users_.add(pages);
  ++counters_.map_calls;
  counters_.hit_pages += pages.count - missing;
  return DmaMapping(this, RunsOfLocked(pages));
}

Result<void> DmaCache::FillLocked(PageRun gap, Direction direction) {
  MVGPU_ASSIGN_OR_RETURN(domain::PinnedRange rest, pins_->pin(RangeOf(gap), AccessFor(direction)));
  const bool is_writable = domain_->check(RangeOf(gap), domain::Access::kReadWrite).has_value();
  std::vector<MappedRun> mapped;
  MVGPU_RETURN_IF_ERROR(mapper_->map(
      rest.runs(), is_writable ? domain::Access::kReadWrite : domain::Access::kRead, &mapped));
  for (const MappedRun& run : mapped) {
    const PageRun pages = PagesOf(run.iova);
    domain::PinnedRange tail;
    if (pages.end() < gap.end()) tail = rest.split_off(Iova(BytesIn(pages.end())));
    entries_.emplace(pages.first,
                     Entry{pages.count, run.address, next_generation_++, std::move(rest)});
    counters_.cached_pages += pages.count;
    counters_.miss_pages += pages.count;
    rest = std::move(tail);
  }
  return {};
}

void DmaCache::DropLocked(PageRun pages) {
  SplitAtLocked(pages.first);
  SplitAtLocked(pages.end());
  auto it = entries_.lower_bound(pages.first);
  while (it != entries_.end() && it->first < pages.end()) {
    Entry& entry = it->second;
    mapper_->unmap(entry.address, BytesIn(entry.pages));
    counters_.unmapped_pages += entry.pages;
    counters_.cached_pages -= entry.pages;
    mapper_->flush();
    it = entries_.erase(it);  // lets go of the pin, after the device mapping
  }
}

void DmaCache::SplitAtLocked(uint64_t page) {
  auto it = FirstOverlapLocked({page, 1});
  if (it == entries_.end() || it->first >= page) return;
  Entry& head = it->second;
  const uint64_t head_pages = page - it->first;
  Entry tail{head.pages - head_pages, head.address + BytesIn(head_pages), head.generation,
             head.pin.split_off(Iova(BytesIn(page)))};
  head.pages = head_pages;
  entries_.emplace(page, std::move(tail));
}

DmaCache::Entries::iterator DmaCache::FirstOverlapLocked(PageRun pages) {
  auto it = entries_.upper_bound(pages.first);
  if (it != entries_.begin()) {
    auto before = std::prev(it);
    if (before->first + before->second.pages > pages.first) return before;
  }
  return it;
}

const DmaCache::Entry* DmaCache::FindLocked(uint64_t page) const {
  auto it = entries_.upper_bound(page);
  if (it == entries_.begin()) return nullptr;
  --it;
  return it->first + it->second.pages > page ? &it->second : nullptr;
}

std::vector<DmaRun> DmaCache::RunsOfLocked(PageRun pages) {
  std::vector<DmaRun> runs;
  for (auto it = FirstOverlapLocked(pages); it != entries_.end() && it->first < pages.end(); ++it) {
    const uint64_t first = std::max(it->first, pages.first);
    const uint64_t end = std::min(it->first + it->second.pages, pages.end());
    runs.push_back({RangeOf({first, end - first}), it->second.address + BytesIn(first - it->first),
                    it->second.generation});
  }
  return runs;
}

void DmaCache::release(std::span<const DmaRun> runs) {
  MutexLock lock(mutex_);
  for (const DmaRun& run : runs) {
    const PageRun pages = PagesOf(run.iova);
    // Parts of the run that are still of its generation; the others were revoked and owe nothing.
    std::vector<PageRun> held;
    for (auto it = FirstOverlapLocked(pages); it != entries_.end() && it->first < pages.end();
         ++it) {
      if (it->second.generation != run.generation) continue;
      const uint64_t first = std::max(it->first, pages.first);
      held.push_back({first, std::min(it->first + it->second.pages, pages.end()) - first});
    }
    for (const PageRun& part : held) {
      for (const PageRun& unused : users_.remove(part)) DropLocked(unused);
    }
  }
}

void DmaCache::on_revoke(IovaRange range) {
  const PageRun pages = PagesOf(range);
  MutexLock lock(mutex_);
  const uint64_t before = counters_.cached_pages;
  DropLocked(pages);
  users_.clear(pages);
  counters_.revoked_pages += before - counters_.cached_pages;
}

bool DmaCache::is_valid(std::span<const DmaRun> runs) const {
  ReaderMutexLock lock(mutex_);
  for (const DmaRun& run : runs) {
    const PageRun pages = PagesOf(run.iova);
    for (uint64_t page = pages.first; page < pages.end();) {
      const Entry* entry = FindLocked(page);
      if (entry == nullptr || entry->generation != run.generation) return false;
      page = entry->pin.runs().front().iova_pages().end();
    }
  }
  return true;
}

Result<void> DmaCache::read(std::span<const DmaRun> runs, Iova iova,
                            std::span<std::byte> destination) const {
  if (destination.empty()) return {};
  const auto range = IovaRange::FromStartAndSize(iova, destination.size());
  const IovaRange mapped =
      IovaRange::FromFirstAndLast(runs.front().iova.start(), runs.back().iova.last());
  if (!range || !mapped.contains(*range)) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("read of {} bytes at iova {:#x} leaves the dma mapping {:#x}-{:#x}",
                            destination.size(), iova.value(), mapped.start().value(),
                            mapped.last().value()));
  }
  ReaderMutexLock lock(mutex_);
  auto run = std::lower_bound(runs.begin(), runs.end(), iova,
                              [](const DmaRun& r, Iova at) { return r.iova.last() < at; });
  for (Iova at = iova; !destination.empty();) {
    if (run->iova.last() < at) ++run;
    const Entry* entry = FindLocked(at.page());
    if (entry == nullptr || entry->generation != run->generation) {
      return Fail(ErrorCode::kRevoked,
                  fmt::format("iova {:#x} was unmapped by the vmm while in use", at.value()));
    }
    const domain::PinnedRun& pinned = entry->pin.runs().front();
    const Iova last = std::min(pinned.iova.last(), run->iova.last());
    const size_t size = std::min<uint64_t>(destination.size(), last - at + 1);
    MVGPU_RETURN_IF_ERROR(domain_->read_pinned(pinned, at, destination.first(size)));
    destination = destination.subspan(size);
    at = at + size;
  }
  return {};
}

DmaCache::Counters DmaCache::counters() const {
  ReaderMutexLock lock(mutex_);
  Counters counters = counters_;
  counters.entries = entries_.size();
  return counters;
}

}  // namespace mvgpu::dma
