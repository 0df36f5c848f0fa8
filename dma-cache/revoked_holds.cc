#include "dma-cache/revoked_holds.h"

#include <algorithm>
#include <iterator>

namespace mvgpu::dma {

RevokedHolds::Runs::const_iterator RevokedHolds::FirstOverlap(PageRun pages) const {
  auto it = runs_.upper_bound(pages.first);
  if (it != runs_.begin() && std::prev(it)->second.end > pages.first) --it;
  return it;
}

void RevokedHolds::SplitAt(uint64_t page) {
  auto it = runs_.upper_bound(page);
  if (it == runs_.begin()) return;
  --it;
  if (it->first == page || it->second.end <= page) return;
  const Run tail = it->second;
  it->second.end = page;
  runs_.emplace(page, tail);
}

void RevokedHolds::add(PageRun pages, uint64_t holds, uint64_t epoch) {
  SplitAt(pages.first);
  SplitAt(pages.end());
  for (uint64_t page = pages.first; page < pages.end();) {
    auto it = runs_.lower_bound(page);
    if (it != runs_.end() && it->first == page) {
      it->second.epoch = epoch;
      it->second.holds += holds;
    } else {
      const uint64_t next = it == runs_.end() ? pages.end() : std::min(it->first, pages.end());
      it = runs_.emplace(page, Run{next, epoch, holds}).first;
    }
    page = it->second.end;
  }
}

bool RevokedHolds::any(PageRun pages, uint64_t epoch) const {
  for (auto it = FirstOverlap(pages); it != runs_.end() && it->first < pages.end(); ++it) {
    if (it->second.epoch > epoch) return true;
  }
  return false;
}

void RevokedHolds::release(PageRun pages, uint64_t epoch, std::vector<PageRun>* real) {
  const auto append = [real](uint64_t first, uint64_t end) {
    if (first == end) return;
    if (!real->empty() && real->back().end() == first) {
      real->back().count += end - first;
    } else {
      real->push_back({first, end - first});
    }
  };
  if (any(pages, epoch)) {
    SplitAt(pages.first);
    SplitAt(pages.end());
  }
  uint64_t page = pages.first;
  auto it = runs_.lower_bound(page);
  if (it != runs_.begin() && std::prev(it)->second.end > page) --it;
  while (it != runs_.end() && it->first < pages.end()) {
    const uint64_t end = std::min(it->second.end, pages.end());
    const uint64_t first = std::max(it->first, page);
    append(page, first);
    page = end;
    if (it->second.epoch <= epoch) {
      append(first, end);
      ++it;
    } else if (--it->second.holds == 0) {
      it = runs_.erase(it);
    } else {
      ++it;
    }
  }
  append(page, pages.end());
}

}  // namespace mvgpu::dma
