#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "apionly-domain/nested/table_walker.h"
#include "apionly-domain/viommu/vtd_tables.h"

namespace mvgpu::domain {

// Requests of devices that were translated lately, whole: in front of the three look-ups that an
// answer otherwise takes (vtd_caches.h). One place for each request, 4 KiB each, whatever the size
// of the guest's page. An invalidation of anything forgets all of them, which costs one addition.
//
// Only what devices access themselves (VtdRequest::Kind::kUntranslated) is remembered.
//
// Not thread-safe.
class RecentTranslations {
 public:
  struct Translation {
    uint64_t address;
    uint64_t span;  // bytes of the page of the tables, a power of two
    Rights rights;
  };

  // Room for `entries`, rounded up to a power of two.
  explicit RecentTranslations(size_t entries)
      : entries_(std::bit_ceil(entries)), mask_(entries_.size() - 1) {}

  // False where the same was not asked lately, or not all that is wanted is marked in the tables.
  // REQUIRES: the PASID has at most vtd::kPasidBits bits.
  bool find(const VtdRequest& request, Translation* out) const {
    const uint64_t who = WhoOf(request);
    const Entry& entry = entries_[IndexOf(who, request.address)];
    const bool is_known = entry.who == who && entry.page == request.address >> kPageShift &&
                          (request.wanted.rights & ~entry.marked) == 0;
    // To want nothing leaves no marks in tables, and no traces here.
    if (!is_known || request.wanted.rights == 0) return false;
    *out = {entry.frame | (request.address & kPageMask), uint64_t{1} << entry.shift, entry.rights};
    return true;
  }

  // REQUIRES: as for find(); `leaf` is good for what it is marked for, until forget().
  void remember(const VtdRequest& request, const Leaf& leaf) {
    if (request.kind != VtdRequest::Kind::kUntranslated) return;
    const uint64_t who = WhoOf(request);
    Entry& entry = entries_[IndexOf(who, request.address)];
    entry = {who,
             request.address >> kPageShift,
             leaf.out & ~kPageMask,
             static_cast<uint8_t>(std::countr_zero(leaf.span)),
             leaf.rights,
             leaf.marked};
  }

  void forget() {
    if (++generation_ == kGenerations) {
      entries_.assign(entries_.size(), Entry{});
      generation_ = 1;
    }
  }

 private:
  struct Entry {
    uint64_t who = 0;
    uint64_t page = 0;  // address >> kPageShift
    uint64_t frame = 0;
    uint8_t shift = 0;
    Rights rights = 0;
    Rights marked = 0;  // as in Leaf
  };
  static constexpr uint64_t kGenerations = uint64_t{1} << 24;

  // The sender in one word: source, PASID, the two flags, the kind of the request, the generation.
  uint64_t WhoOf(const VtdRequest& request) const {
    const uint64_t flags = (request.pasid ? 1u : 0u) | (request.wanted.privileged ? 2u : 0u) |
                           static_cast<uint64_t>(request.kind) << 2;
    return request.source | uint64_t{request.pasid.value_or(0)} << 16 | flags << 36 |
           generation_ << 40;
  }
  size_t IndexOf(uint64_t who, uint64_t address) const {
    constexpr uint64_t kOdd = 0x9e37'79b9'7f4a'7c15;
    return ((address >> kPageShift) + (who * kOdd >> 32)) & mask_;
  }

  std::vector<Entry> entries_;
  const size_t mask_;
  uint64_t generation_ = 1;  // entries that nobody wrote have none
};

}  // namespace mvgpu::domain
