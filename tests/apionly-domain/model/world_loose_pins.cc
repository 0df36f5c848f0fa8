// Steps that pin and release single pages, without handles.

#include <algorithm>
#include <map>

#include "tests/apionly-domain/model/world.h"

namespace mvgpu::domain::model {

namespace {

constexpr size_t kBatch = 64;  // pages of pin_pages() that go together

// 1 to 300 pages, often the same ones, often in another order; `pages` different ones at most.
std::vector<uint64_t> ListOfPages(const Operation& o, uint64_t first, uint64_t pages) {
  const uint64_t length = 1 + (o.extra >> 4) % (o.extra % 16 < 4 ? 300 : 12);
  const uint64_t stride = 1 + o.extra % 3;
  std::vector<uint64_t> list(length);
  for (uint64_t i = 0; i < length; ++i) list[i] = first + i * stride % pages;
  return list;
}

}  // namespace

void World::PinPages(const Operation& o) {
  Side& side = side_of(o);
  const auto access = static_cast<Access>(o.access);
  const Pages pages = PagesOf(o, 80);
  last_ = pages;
  const std::vector<uint64_t> list = ListOfPages(o, pages.first, pages.count);
  Verdict expected;
  for (const uint64_t page : list) {
    if (!expected) expected = VerdictOnAccess(side, {page, 1}, access, /*remote=*/false);
  }
  uint64_t fresh = 0;
  if (!expected) {
    fresh = FreshPages(side, list);
    if (side.pins.backing().size() + fresh > side.pin_limit) expected = ErrorCode::kLimit;
  }
  std::vector<Iova> iovas;
  for (const uint64_t page : list) iovas.emplace_back(page * kPageSize + o.extra % kPageSize);
  std::vector<std::byte*> host(list.size());
  side.backend->failed = false;
  const auto pinned = side.contexts[o.context]->pin_pages(iovas, access, host);
  if (side.backend->failed && !pinned) expected = ErrorCode::kSystem;
  // Beyond the limit before it came to the page that is not mapped: also right.
  const bool was_full = !pinned && pinned.error().code() == ErrorCode::kLimit &&
                        side.pins.backing().size() + list.size() > side.pin_limit;
  ExpectVerdict(was_full ? Verdict(ErrorCode::kLimit) : expected, pinned, "pin pages");
  const bool for_write = Allows(access, Access::kWrite);
  if (expected) {
    // What was pinned first and then released again counts, and may be marked.
    for (const uint64_t page : list) {
      if (for_write) side.dirty.mark_maybe(page, 1);
    }
    return TakeOverFigures(side, list.size());
  }
  std::map<int, std::byte*> bases;
  for (size_t i = 0; i < list.size(); ++i) {
    const Backing backing = memory_.at(list[i])->backing(list[i]);
    if (!bases.contains(backing.file)) bases[backing.file] = HostOf({backing.file, 0});
    if (host[i] != bases[backing.file] + backing.page * kPageSize + o.extra % kPageSize) {
      Complain("pin pages: entry {} has the wrong host address", i);
    }
    side.pins.add(o.context, for_write, How::kLoose, list[i], backing);
  }
  CountPins(side, list.size(), fresh);
}

// After a call that failed half-way: figures of what was done since creation may have grown.
void World::TakeOverFigures(Side& side, uint64_t at_most) {
  const ApiOnlyDomain::Counters got = side.domain->counters();
  const auto take_over = [&](uint64_t value, uint64_t* expected, uint64_t most,
                             std::string_view what) {
    if (value < *expected || value > most) {
      Complain("{} is {}, it should be {} to {}", what, value, *expected, most);
    }
    *expected = value;
  };
  take_over(got.pages_pinned, &side.pages_pinned, side.pages_pinned + at_most, "pages pinned");
  take_over(got.pages_locked_first, &side.first_locks, side.first_locks + at_most, "first locks");
  take_over(got.peak_unique_pages, &side.peak,
            std::max(side.peak, side.pins.backing().size() + at_most), "peak");
}

void World::UnpinPages(const Operation& o) {
  Side& side = side_of(o);
  const bool for_write = o.access != 1;
  const auto& loose = side.pins.counts(o.context, for_write, How::kLoose);
  if (loose.empty()) return;
  // From one of the pages on, as many as are there, each as often as it was pinned at most.
  const auto start = std::next(loose.begin(), o.page % static_cast<uint32_t>(loose.size()));
  std::map<uint64_t, uint64_t> taken;
  std::vector<Iova> list;
  for (const uint64_t page : ListOfPages(o, start->first, o.pages)) {
    if (taken[page]++ >= side.pins.count(o.context, for_write, How::kLoose, page)) continue;
    list.emplace_back(page * kPageSize);
  }
  last_ = {start->first, 1};
  TryUnpin(side, o.context, for_write, list);
}

void World::UnpinTooMany(const Operation& o) {
  Side& side = side_of(o);
  const bool for_write = o.access != 1;
  const Pages pages = PagesOf(o, 1);
  last_ = pages;
  const auto dense = [&](uint64_t page) {
    return side.pins.count(o.context, for_write, How::kLoose, page) +
           side.pins.count(o.context, for_write, How::kHandle, page);
  };
  const uint64_t held = dense(pages.first);
  if (held >= kBatch) return;  // it would take several batches, and the first of them goes well
  std::vector<Iova> list(held + 1, Iova(pages.first * kPageSize));
  const uint64_t other = pages.first + 1;  // released or not with the batch
  if (other < kAllPages && side.pins.count(o.context, for_write, How::kLoose, other) != 0) {
    list.insert(list.begin(), Iova(other * kPageSize));
  }
  if (list.size() > kBatch) return;
  TryUnpin(side, o.context, for_write, list);
}

void World::TryUnpin(Side& side, uint32_t context, bool for_write, std::span<const Iova> list) {
  Verdict expected;
  for (size_t done = 0; done < list.size() && !expected; done += kBatch) {
    const auto batch = list.subspan(done, std::min(kBatch, list.size() - done));
    std::map<uint64_t, uint64_t> wanted;
    for (const Iova iova : batch) ++wanted[iova.page()];
    for (const auto& [page, times] : wanted) {
      const uint64_t held = side.pins.count(context, for_write, How::kLoose, page) +
                            side.pins.count(context, for_write, How::kHandle, page);
      if (times > held) expected = ErrorCode::kInvalid;
    }
    if (expected) break;
    for (const Iova iova : batch) {
      const uint64_t page = iova.page();
      side.pins.remove(context, for_write, How::kLoose, page, memory_.at(page)->backing(page));
      if (for_write) side.dirty.mark(page, 1);
    }
  }
  const auto access = for_write ? Access::kReadWrite : Access::kRead;
  ExpectVerdict(expected, side.contexts[context]->unpin_pages(list, access), "unpin pages");
}

}  // namespace mvgpu::domain::model
