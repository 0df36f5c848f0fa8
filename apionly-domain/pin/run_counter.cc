#include "apionly-domain/pin/run_counter.h"

#include <algorithm>
#include <iterator>

#include "apionly-domain/base/check.h"

namespace mvgpu::domain {

RunCounter::Runs::const_iterator RunCounter::first_overlap(PageRun run) const {
  auto it = runs_.upper_bound(run.first);
  if (it != runs_.begin()) {
    auto before = std::prev(it);
    if (before->second.end > run.first) return before;
  }
  return it;
}

std::vector<PageRun> RunCounter::uncovered(PageRun run) const {
  std::vector<PageRun> gaps;
  for_each_uncovered(run, [&gaps](PageRun gap) { gaps.push_back(gap); });
  return gaps;
}

bool RunCounter::any(PageRun run) const {
  auto it = first_overlap(run);
  return it != runs_.end() && it->first < run.end();
}

uint64_t RunCounter::count(uint64_t page) const {
  auto it = first_overlap({page, 1});
  return it != runs_.end() && it->first <= page ? it->second.count : 0;
}

void RunCounter::add(PageRun run) {
  if (run.count == 0) return;
  split_at(run.first);
  split_at(run.end());
  for (uint64_t page = run.first; page < run.end();) {
    auto it = runs_.lower_bound(page);
    const uint64_t next = it == runs_.end() ? run.end() : std::min(it->first, run.end());
    if (next > page) {
      runs_.insert({page, Entry{next, 1}});
      unique_pages_ += next - page;
      page = next;
    } else {
      ++it->second.count;
      page = it->second.end;
    }
  }
  total_ += run.count;
  merge_around(run);
}

std::vector<PageRun> RunCounter::remove(PageRun run) {
  std::vector<PageRun> freed;
  if (run.count == 0) return freed;
  split_at(run.first);
  split_at(run.end());
  for (uint64_t page = run.first; page < run.end();) {
    auto it = runs_.find(page);
    MVGPU_CHECK(it != runs_.end());  // released more often than held
    const uint64_t end = it->second.end;
    if (--it->second.count == 0) {
      if (!freed.empty() && freed.back().end() == page) {
        freed.back().count += end - page;
      } else {
        freed.push_back({page, end - page});
      }
      unique_pages_ -= end - page;
      runs_.erase(it);
    }
    page = end;
  }
  total_ -= run.count;
  merge_around(run);
  return freed;
}

void RunCounter::clear(PageRun run) {
  if (run.count == 0) return;
  split_at(run.first);
  split_at(run.end());
  auto first = runs_.lower_bound(run.first);
  auto last = runs_.lower_bound(run.end());
  for (auto it = first; it != last; ++it) {
    const uint64_t pages = it->second.end - it->first;
    unique_pages_ -= pages;
    total_ -= pages * it->second.count;
  }
  runs_.erase(first, last);
}

void RunCounter::split_at(uint64_t page) {
  auto it = runs_.upper_bound(page);
  if (it == runs_.begin()) return;
  --it;
  if (it->first == page || it->second.end <= page) return;
  const Entry tail{it->second.end, it->second.count};
  it->second.end = page;
  runs_.insert({page, tail});
}

void RunCounter::merge_around(PageRun run) {
  auto it = runs_.lower_bound(run.first);
  if (it != runs_.begin()) --it;
  while (it != runs_.end() && it->first <= run.end()) {
    auto next = std::next(it);
    if (next == runs_.end() || next->first > run.end()) return;
    if (it->second.end == next->first && it->second.count == next->second.count) {
      const uint64_t first = it->first;
      it->second.end = next->second.end;
      runs_.erase(next);  // invalidates every iterator of a B-tree
      it = runs_.find(first);
    } else {
      it = next;
    }
  }
}

}  // namespace mvgpu::domain
