#include "apionly-domain/pin/pin_counts.h"

namespace mvgpu::domain {

void PinCounts::add(PageRun run, Form form) {
  if (form == Form::kDense) {
    dense_.add(run);
  } else {
    runs_.add(run);
  }
}

void PinCounts::remove(PageRun run, Form form, std::vector<PageRun>* freed) {
  if (form == Form::kDense && runs_.empty()) return dense_.remove(run, freed);
  std::vector<PageRun> gone;
  if (form == Form::kDense) {
    dense_.remove(run, &gone);
  } else {
    gone = runs_.remove(run);
  }
  // What one form let go may still be held in the other.
  for (const PageRun& part : gone) append_unheld(part, freed);
}

bool PinCounts::try_add(PageRun run, Form form) {
  if (form == Form::kDense && dense_.try_add(run)) return true;
  if (!dense_.all_held(run)) {
    if (runs_.empty()) return false;
    std::vector<PageRun> unheld;
    append_unheld(run, &unheld);
    if (!unheld.empty()) return false;
  }
  add(run, form);
  return true;
}

bool PinCounts::try_remove(PageRun run, Form form) {
  if (form == Form::kDense && dense_.try_remove(run)) return true;
  if (form == Form::kDense && runs_.empty() && !dense_.all_held_twice(run)) return false;
  std::vector<PageRun> freed;
  remove(run, form, &freed);
  if (freed.empty()) return true;
  add(run, form);
  return false;
}

void PinCounts::append_unheld(PageRun run, std::vector<PageRun>* unheld) const {
  if (run.count == 1) {  // the usual case, and what a miss spends its time on
    if (!holds(run.first)) unheld->push_back(run);
    return;
  }
  runs_.for_each_uncovered(run, [&](PageRun gap) {
    uint64_t page = gap.first;
    dense_.for_each_held(gap, [&](PageRun held) {
      if (held.first > page) unheld->push_back({page, held.first - page});
      page = held.end();
    });
    if (page < gap.end()) unheld->push_back({page, gap.end() - page});
  });
}

void PinCounts::append_held(PageRun run, std::vector<PageRun>* held) const {
  runs_.for_each(run, [held](PageRun part) { held->push_back(part); });
  dense_.for_each_held(run, [held](PageRun part) { held->push_back(part); });
}

bool PinCounts::any(PageRun run) const { return runs_.any(run) || dense_.any(run); }

}  // namespace mvgpu::domain
