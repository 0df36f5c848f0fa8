#pragma once

#include <cstdint>
#include <vector>

#include "apionly-domain/base/address.h"
#include "apionly-domain/pin/page_counters.h"
#include "apionly-domain/pin/run_counter.h"

namespace mvgpu::domain {

// What one context holds for one kind of access, by IOVA page: up to kLargestDense pages at a time
// in counters of 2 bits per page, anything larger as runs, so that a pin of all RAM costs one
// entry. A page is held when either of them counts it.
//
// The try_ functions change counts only where that changes nothing about which pages are held:
// hits. What changes the set of held pages is a miss, and the domain's business.
//
// Not thread-safe: guarded by the lock of its context.
class PinCounts {
 public:
  static constexpr uint64_t kLargestDense = 512;
  enum class Form : uint8_t { kDense, kRuns };
  static constexpr Form FormFor(uint64_t pages) {
    return pages <= kLargestDense ? Form::kDense : Form::kRuns;
  }

  // False, and nothing is changed, when some page of the run is not held yet.
  bool try_add(PageRun run, Form form);
  // False, and nothing is changed, when some page of the run would be held no longer.
  // REQUIRES: the run was added in this form.
  bool try_remove(PageRun run, Form form);

  void add(PageRun run, Form form);
  // Appends the pages that are held no longer. REQUIRES: the run was added in this form.
  void remove(PageRun run, Form form, std::vector<PageRun>* freed);

  // Forgets the pages of the run, however often they are held. Calls visit(PageRun, count) for
  // stretches that were held equally often in one form.
  template <typename Visit>
  void forget(PageRun run, Visit visit);

  bool holds(uint64_t page) const {
    return dense_.holds(page) || (!runs_.empty() && runs_.count(page) != 0);
  }
  // The parts of `run` that are not held, appended in order.
  void append_unheld(PageRun run, std::vector<PageRun>* unheld) const;
  // The stretches of held pages in the run, appended; pages may stand there twice.
  void append_held(PageRun run, std::vector<PageRun>* held) const;
  bool any(PageRun run) const;

  bool empty() const { return dense_.held_pages() == 0 && runs_.empty(); }
  bool has_runs() const { return !runs_.empty(); }
  PageCounters& dense() { return dense_; }
  const PageCounters& dense() const { return dense_; }
  // Gives back counters of pages in the run, where nothing is held.
  void trim(PageRun run) { dense_.trim(run); }

 private:
  PageCounters dense_;
  RunCounter runs_;
};

template <typename Visit>
void PinCounts::forget(PageRun run, Visit visit) {
  std::vector<PageRun> held;
  dense_.for_each_held(run, [&held](PageRun part) { held.push_back(part); });
  for (const PageRun& part : held) {
    PageRun stretch{part.first, 0};
    uint64_t count = 0;  // of its pages
    for (uint64_t page = part.first; page < part.end(); ++page, ++stretch.count) {
      const uint64_t holds = dense_.forget(page);
      if (holds == count) continue;
      if (stretch.count != 0) visit(stretch, count);
      stretch = {page, 0};
      count = holds;
    }
    visit(stretch, count);
  }
  runs_.for_each(run, [&](PageRun part) { visit(part, runs_.count(part.first)); });
  runs_.clear(run);
}

}  // namespace mvgpu::domain
