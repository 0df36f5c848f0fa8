#include "dma-cache/idle_list.h"

#include <algorithm>
#include <iterator>

#include "apionly-domain/base/check.h"

namespace mvgpu::dma {

void IdleList::Insert(uint64_t first, Run run) {
  runs_.emplace(first, run);
  by_age_.emplace(run.age, first);
  pages_ += run.end - first;
}

void IdleList::Erase(absl::btree_map<uint64_t, Run>::iterator it) {
  pages_ -= it->second.end - it->first;
  by_age_.erase({it->second.age, it->first});
  runs_.erase(it);
}

void IdleList::add(PageRun pages) { Insert(pages.first, {pages.end(), next_age_++}); }

void IdleList::take(PageRun pages, std::vector<PageRun>* taken) {
  for (;;) {
    auto it = runs_.upper_bound(pages.first);
    if (it != runs_.begin() && std::prev(it)->second.end > pages.first) --it;
    if (it == runs_.end() || it->first >= pages.end()) return;
    const uint64_t first = it->first;
    const Run run = it->second;
    Erase(it);
    // What lies outside keeps its age.
    if (first < pages.first) Insert(first, {pages.first, run.age});
    if (run.end > pages.end()) Insert(pages.end(), {run.end, run.age});
    const uint64_t from = std::max(first, pages.first);
    const uint64_t end = std::min(run.end, pages.end());
    taken->push_back({from, end - from});
    if (end == pages.end()) return;
    pages = {end, pages.end() - end};
  }
}

PageRun IdleList::take_oldest(uint64_t most) {
  MVGPU_DCHECK(pages_ > 0 && most > 0);
  const auto it = runs_.find(by_age_.begin()->second);
  const uint64_t first = it->first;
  const Run run = it->second;
  Erase(it);
  const uint64_t end = run.end - first > most ? first + most : run.end;
  if (end < run.end) Insert(end, {run.end, run.age});
  return {first, end - first};
}

}  // namespace mvgpu::dma
