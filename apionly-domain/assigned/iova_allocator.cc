#include "apionly-domain/assigned/iova_allocator.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <iterator>

namespace mvgpu::domain {

namespace {

constexpr uint64_t kLowestHandedOut = 1;  // a page number

}  // namespace

IovaAllocator::IovaAllocator(std::span<const IovaRange> usable, uint64_t page_sizes,
                             Iova prefer_below)
    : usable_(usable.begin(), usable.end()),
      page_sizes_(page_sizes),
      low_{prefer_below.page(), prefer_below.page()},
      whole_{uint64_t{1} << (64 - kPageShift), uint64_t{1} << (64 - kPageShift)} {
  for (const IovaRange& range : usable_) {
    // Of pages that are usable in part nothing is handed out.
    const uint64_t first = PagesIn(range.start().value() + kPageMask);
    const uint64_t end = range.last().page() + (range.last().offset_in_page() == kPageMask ? 1 : 0);
    if (range.start().value() > UINT64_MAX - kPageMask || first >= end) continue;
    free_.emplace(first, end);
    free_pages_ += end - first;
  }
}

Result<IovaRange> IovaAllocator::allocate(uint64_t size, const std::byte* host) {
  const uint64_t pages = PagesIn(size);
  const Congruence wish = WishFor(pages, host);
  auto first = Find(low_, pages, wish);
  if (!first) first = Find(whole_, pages, wish);
  if (!first && wish.modulus > 1) {
    first = Find(low_, pages, {});
    if (!first) first = Find(whole_, pages, {});
  }
  if (!first) return FullError(size);
  Take({*first, pages});
  return RangeOf({*first, pages});
}

// The largest page of the IOMMU that fits in, beyond the smallest.
IovaAllocator::Congruence IovaAllocator::WishFor(uint64_t pages, const std::byte* host) const {
  for (unsigned bit = 63; bit > kPageShift; --bit) {
    const uint64_t page_size = uint64_t{1} << bit;
    if ((page_sizes_ & page_size) == 0 || BytesIn(pages) < page_size) continue;
    const uint64_t modulus = PagesIn(page_size);
    return {modulus, PagesIn(std::bit_cast<uint64_t>(host)) % modulus};
  }
  return {};
}

std::optional<uint64_t> IovaAllocator::Find(Zone& zone, uint64_t pages, Congruence wish) {
  auto first = FindBelow(zone.next, pages, wish);
  if (!first) first = FindBelow(zone.end, pages, wish);
  if (first) zone.next = *first;
  return first;
}

// The highest place that ends at or below `end`.
std::optional<uint64_t> IovaAllocator::FindBelow(uint64_t end, uint64_t pages,
                                                 Congruence wish) const {
  for (auto it = free_.lower_bound(end); it != free_.begin();) {
    --it;
    const uint64_t lowest = std::max(it->first, kLowestHandedOut);
    const uint64_t highest_end = std::min(it->second, end);
    if (highest_end < lowest || highest_end - lowest < pages) continue;
    const uint64_t start = highest_end - pages;
    const uint64_t excess = (start % wish.modulus + wish.modulus - wish.rest) % wish.modulus;
    if (start - lowest >= excess) return start - excess;
  }
  return std::nullopt;
}

Result<void> IovaAllocator::reserve(IovaRange range) {
  if (!IsUsable(range)) {
    return Fail(ErrorCode::kNotReachable,
                fmt::format("iova {:#x}-{:#x} is not inside what the device's iommu translates",
                            range.start().value(), range.last().value()));
  }
  const PageRun pages = PagesOf(range);
  auto it = free_.upper_bound(pages.first);
  if (it == free_.begin() || std::prev(it)->second < pages.end()) {
    return Fail(ErrorCode::kOverlap, fmt::format("device iova {:#x}-{:#x} is in use already",
                                                 range.start().value(), range.last().value()));
  }
  Take(pages);
  return {};
}

bool IovaAllocator::IsUsable(IovaRange range) const {
  return std::any_of(usable_.begin(), usable_.end(),
                     [&](const IovaRange& usable) { return usable.contains(range); });
}

void IovaAllocator::Take(PageRun pages) {
  const auto it = std::prev(free_.upper_bound(pages.first));
  const uint64_t first = it->first;
  const uint64_t end = it->second;
  MVGPU_CHECK(first <= pages.first && pages.end() <= end);
  auto next = std::next(it);
  if (first < pages.first) {
    it->second = pages.first;
  } else {
    next = free_.erase(it);
  }
  if (pages.end() < end) free_.emplace_hint(next, pages.end(), end);
  free_pages_ -= pages.count;
}

void IovaAllocator::free(IovaRange range) {
  MVGPU_CHECK(IsUsable(range));
  PageRun pages = PagesOf(range);
  free_pages_ += pages.count;
  auto next = free_.lower_bound(pages.first);
  MVGPU_CHECK(next == free_.end() || next->first >= pages.end());
  if (next != free_.end() && next->first == pages.end()) {
    pages.count = next->second - pages.first;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    const auto before = std::prev(next);
    MVGPU_CHECK(before->second <= pages.first);
    if (before->second == pages.first) {
      before->second = pages.end();
      return;
    }
  }
  free_.emplace(pages.first, pages.end());
}

tl::unexpected<Error> IovaAllocator::FullError(uint64_t size) const {
  uint64_t largest = 0;
  for (const auto& [first, end] : free_) largest = std::max(largest, end - first);
  return Fail(ErrorCode::kLimit,
              fmt::format("no device iova for {} bytes: {} bytes are free, at most {} in one "
                          "piece; map less at a time or use an iommu with wider addresses",
                          size, BytesIn(free_pages_), BytesIn(largest)));
}

}  // namespace mvgpu::domain
