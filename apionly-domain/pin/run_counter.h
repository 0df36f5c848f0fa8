#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include <absl/container/btree_map.h>

#include "apionly-domain/base/address.h"

namespace mvgpu::domain {

// Counts how often each page is held, stored as runs of pages with the same count: cost and memory
// follow the number of runs, never the number of pages. Neighbours with the same count are one run.
//
// Not thread-safe.
class RunCounter {
 public:
  // The parts of `run` that are not held, in order.
  std::vector<PageRun> uncovered(PageRun run) const;
  // Calls visit(PageRun) for each of them.
  template <typename Visit>
  void for_each_uncovered(PageRun run, Visit visit) const {
    uint64_t page = run.first;
    for (auto it = first_overlap(run); it != runs_.end() && it->first < run.end(); ++it) {
      if (it->first > page) visit(PageRun{page, it->first - page});
      page = it->second.end;
    }
    if (page < run.end()) visit(PageRun{page, run.end() - page});
  }
  // True when any page of the run is held.
  bool any(PageRun run) const;
  // Calls visit(PageRun) for each stretch of held pages in the run, in order.
  template <typename Visit>
  void for_each(PageRun run, Visit visit) const {
    for (auto it = first_overlap(run); it != runs_.end() && it->first < run.end(); ++it) {
      const uint64_t first = std::max(it->first, run.first);
      visit(PageRun{first, std::min(it->second.end, run.end()) - first});
    }
  }

  void add(PageRun run);
  // Returns the parts that are held no longer. REQUIRES: every page of `run` is held.
  std::vector<PageRun> remove(PageRun run);
  // Forgets the pages of the run, however often they are held.
  void clear(PageRun run);

  uint64_t count(uint64_t page) const;
  uint64_t unique_pages() const { return unique_pages_; }
  uint64_t total() const { return total_; }  // sum of all counts
  bool empty() const { return runs_.empty(); }
  size_t runs() const { return runs_.size(); }

 private:
  struct Entry {
    uint64_t end;    // page behind the last one
    uint64_t count;  // > 0
  };
  using Runs = absl::btree_map<uint64_t, Entry>;  // by first page; disjoint

  // Makes `page` the start of a run if it lies inside one.
  void split_at(uint64_t page);
  // Joins runs that meet inside `run` or at its ends and have the same count.
  void merge_around(PageRun run);
  Runs::const_iterator first_overlap(PageRun run) const;

  Runs runs_;
  uint64_t unique_pages_ = 0;
  uint64_t total_ = 0;
};

}  // namespace mvgpu::domain
