#pragma once

#include <cstdint>

namespace mvgpu::domain {

// How coarsely memory is locked, so that scattered locks never use up the memory areas of a process
// (each lone one splits a mapping and costs the kernel two).
//
// With A areas in use of a budget of B, and files of F pages in all, a new area has a granule of
//   1 page                                  while A < B/2,
//   then doubling in equal steps up to G = 8F/B, rounded up to a power of two, at A = 3B/4,
//   2F/(B-A), rounded up likewise           from there on.
// So few areas are exact, however large the files.
//
// They never run out, in whatever order pages are pinned and unpinned: call an area small if it
// holds no whole aligned granule of G pages, large otherwise. Small ones are only made (or cut
// from others) while A < 3B/4, so there are never more than 3B/4. Large ones are disjoint, so there
// are never more than F/G <= B/8, and one more per file whose last granule is short. The sum is
// below 7B/8 + files. A file that comes later raises F and with it G: the areas left are then
// divided again, at least an eighth of the budget at first and, because the last rule looks at
// B-A, at least half of what is left each time that F doubles. (Exact locks that stand in for a
// granule which RLIMIT_MEMLOCK does not admit are outside this bound, and end with the budget.)
class AreaBudget {
 public:
  // REQUIRES: areas >= 16.
  explicit AreaBudget(uint64_t areas) : areas_(areas) {}

  uint64_t areas() const { return areas_; }
  // Pages, a power of two.
  uint64_t granule(uint64_t areas_in_use, uint64_t total_file_pages) const;
  // Whether an area may be cut in two, or cut short, to release exactly what was unpinned.
  bool allows_cut(uint64_t areas_in_use) const { return areas_in_use < tight(); }

 private:
  uint64_t tight() const { return areas_ / 4 * 3; }

  const uint64_t areas_;
};

}  // namespace mvgpu::domain
