#pragma once

#include <algorithm>
#include <compare>
#include <cstdint>
#include <optional>

#include "apionly-domain/base/check.h"

namespace mvgpu {

// Pages are the unit of pins, charges and cached translations: 4 KiB, as in VFIO.
inline constexpr unsigned kPageShift = 12;
inline constexpr uint64_t kPageSize = uint64_t{1} << kPageShift;
inline constexpr uint64_t kPageMask = kPageSize - 1;

constexpr uint64_t PagesIn(uint64_t bytes) { return bytes >> kPageShift; }
constexpr uint64_t BytesIn(uint64_t pages) { return pages << kPageShift; }

// A 64-bit address of one kind. Kinds do not convert into each other or into integers by
// themselves.
template <typename Kind>
class Address {
 public:
  constexpr Address() = default;
  explicit constexpr Address(uint64_t value) : value_(value) {}

  constexpr uint64_t value() const { return value_; }
  constexpr uint64_t page() const { return value_ >> kPageShift; }
  constexpr uint64_t offset_in_page() const { return value_ & kPageMask; }
  constexpr bool is_page_aligned() const { return offset_in_page() == 0; }

  // Wraps like the integer does: only for offsets that were checked against a Range before.
  constexpr Address operator+(uint64_t offset) const { return Address(value_ + offset); }
  constexpr uint64_t operator-(Address other) const { return value_ - other.value_; }
  constexpr auto operator<=>(const Address&) const = default;

 private:
  uint64_t value_ = 0;
};

using Iova = Address<struct IovaKind>;        // what the device puts on the bus; the VMM maps it
using DmaAddr = Address<struct DmaAddrKind>;  // what dma_map_page returned, the device's own view

// A non-empty range of addresses that never wraps. It may end at 2^64, so that the last byte of the
// address space is usable; therefore last() is inclusive and there is no end().
template <typename A>
class Range {
 public:
  // nullopt when size is 0 or start + size - 1 wraps.
  static constexpr std::optional<Range> FromStartAndSize(A start, uint64_t size) {
    if (size == 0 || start.value() + (size - 1) < start.value()) return std::nullopt;
    return Range(start, start + (size - 1));
  }
  // REQUIRES: first <= last.
  static constexpr Range FromFirstAndLast(A first, A last) {
    MVGPU_DCHECK(first <= last);
    return Range(first, last);
  }

  constexpr A start() const { return start_; }
  constexpr A last() const { return last_; }
  // 0 for all 2^64 addresses, which only FromFirstAndLast() can make.
  constexpr uint64_t size() const { return last_ - start_ + 1; }
  constexpr bool is_page_aligned() const {
    return start_.is_page_aligned() && last_.offset_in_page() == kPageMask;
  }

  constexpr bool contains(A address) const { return address >= start_ && address <= last_; }
  constexpr bool contains(const Range& r) const { return start_ <= r.start_ && r.last_ <= last_; }
  constexpr bool overlaps(const Range& r) const { return start_ <= r.last_ && r.start_ <= last_; }
  constexpr std::optional<Range> intersection(const Range& r) const {
    if (!overlaps(r)) return std::nullopt;
    return FromFirstAndLast(std::max(start_, r.start_), std::min(last(), r.last()));
  }
  // The smallest range of whole pages around this one.
  constexpr Range page_expanded() const {
    return FromFirstAndLast(A(start_.value() & ~kPageMask), A(last().value() | kPageMask));
  }
  constexpr bool operator==(const Range&) const = default;

 private:
  constexpr Range(A start, A last) : start_(start), last_(last) {}
  A start_;
  A last_;
};

using IovaRange = Range<Iova>;

// `count` pages from page number `first` on, within a file or an address space. May be empty.
struct PageRun {
  uint64_t first = 0;
  uint64_t count = 0;

  constexpr uint64_t end() const { return first + count; }
  constexpr bool contains(uint64_t page) const { return page - first < count; }
  constexpr bool operator==(const PageRun&) const = default;
};

// The pages that a range touches, and the range of a run of pages.
constexpr PageRun PagesOf(IovaRange range) {
  const uint64_t first = range.start().page();
  return {first, range.last().page() - first + 1};
}
// REQUIRES: pages.count > 0, and all of it below 2^64 bytes.
constexpr IovaRange RangeOf(PageRun pages) {
  return IovaRange::FromFirstAndLast(Iova(BytesIn(pages.first)),
                                     Iova(BytesIn(pages.end() - 1) | kPageMask));
}

// Checked sums of guest-controlled values: nullopt on overflow, never a wrapped result.
constexpr std::optional<uint64_t> CheckedAdd(uint64_t a, uint64_t b) {
  uint64_t sum = 0;
  if (__builtin_add_overflow(a, b, &sum)) return std::nullopt;
  return sum;
}
constexpr std::optional<uint64_t> CheckedMul(uint64_t a, uint64_t b) {
  uint64_t product = 0;
  if (__builtin_mul_overflow(a, b, &product)) return std::nullopt;
  return product;
}

}  // namespace mvgpu
