// Steps that pin and release.

#include <algorithm>
#include <set>
#include <utility>

#include "tests/apionly-domain/model/world.h"

namespace mvgpu::domain::model {

namespace {

constexpr uint64_t kMostHandlePages = uint64_t{1} << 19;
constexpr uint64_t kLargestSmallHandle = 512;  // pages

std::vector<uint64_t> PageNumbers(uint64_t first, uint64_t count) {
  std::vector<uint64_t> pages(count);
  for (uint64_t i = 0; i < count; ++i) pages[i] = first + i;
  return pages;
}

}  // namespace

uint64_t World::FreshPages(const Side& side, const std::vector<uint64_t>& pages) const {
  std::set<Backing> fresh;
  for (const uint64_t page : pages) {
    const Backing backing = memory_.at(page)->backing(page);
    if (!side.pins.backing().contains(backing)) fresh.insert(fresh.end(), backing);
  }
  return fresh.size();
}

void World::CountPins(Side& side, uint64_t pages, uint64_t fresh) {
  side.pages_pinned += pages;
  side.first_locks += fresh;
  side.peak = std::max(side.peak, side.pins.backing().size());
}

void World::Pin(const Operation& o) {
  const Pages pages = PagesOf(o, kMostHandlePages);
  const uint64_t skip = o.extra % 5 == 0 ? (o.extra >> 8) % kPageSize : 0;
  const uint64_t cut = o.extra % 5 == 1 ? (o.extra >> 8) % kPageSize : 0;
  const auto range =
      testing::MakeRange(pages.first * kPageSize + skip, pages.count * kPageSize - skip - cut);
  TryPin(side_of(o), o.context, range, static_cast<Access>(o.access));
}

void World::TryPin(Side& side, uint32_t context, IovaRange range, Access access) {
  const Pages pages{range.start().page(), range.last().page() - range.start().page() + 1};
  if (going_.empty()) last_ = pages;
  Verdict expected = VerdictOnAccess(side, pages, access, /*remote=*/false);
  std::vector<uint64_t> numbers;
  uint64_t fresh = 0;
  if (!expected) {
    numbers = PageNumbers(pages.first, pages.count);
    fresh = FreshPages(side, numbers);
    if (side.pins.backing().size() + fresh > side.pin_limit) expected = ErrorCode::kLimit;
  }
  const uint64_t calls = side.backend->calls;
  side.backend->failed = false;
  auto pinned = side.contexts[context]->pin(range, access);
  if (side.backend->failed && !expected) expected = ErrorCode::kSystem;
  ExpectVerdict(expected, pinned, "pin");
  if ((fresh != 0 && expected != ErrorCode::kLimit) != (side.backend->calls != calls)) {
    Complain("{} calls of the back end for {} fresh pages", side.backend->calls - calls, fresh);
  }
  if (expected || !problem_.empty()) return;
  CheckRuns(side, *pinned, pages);
  const bool for_write = Allows(access, Access::kWrite);
  const How how = pages.count <= kLargestSmallHandle ? How::kHandle : How::kLargeHandle;
  for (const uint64_t page : numbers) {
    side.pins.add(context, for_write, how, page, memory_.at(page)->backing(page));
  }
  CountPins(side, pages.count, fresh);
  side.handles.push_back({context, for_write, how, pages.first, pages.count, std::move(*pinned)});
}

void World::CheckRuns(Side& side, const PinnedRange& pinned, Pages pages) {
  uint64_t page = pages.first;
  for (PinnedRun run : pinned.runs()) {
    ExpectSame(run.iova.start().value(), page * kPageSize, "start of a run");
    const uint64_t end = run.iova.last().page() + 1;
    while (page < end && problem_.empty()) {  // once for each file that the run goes through
      run = run.slice(IovaRange::FromFirstAndLast(Iova(page * kPageSize), run.iova.last()));
      page += CheckBacking(side, run);
    }
  }
  ExpectSame(page, pages.end(), "end of the runs");
}

uint64_t World::CheckBacking(Side& side, const PinnedRun& run) {
  const FilePages backing = side.domain->backing_of(run);
  const uint64_t first = run.iova.start().page();
  if (backing.pages.count == 0) Complain("no page is behind iova page {:#x}", first);
  const std::byte* base = HostOf({files_.file_of(backing.file->identity().inode), 0});
  for (uint64_t i = 0; i < backing.pages.count; ++i) {
    const Backing expected = memory_.at(first + i)->backing(first + i);
    const Backing got{files_.file_of(backing.file->identity().inode), backing.pages.first + i};
    if (got != expected || run.host + i * kPageSize != base + expected.page * kPageSize) {
      Complain("iova page {:#x} is pinned at another place", first + i);
      break;
    }
  }
  return backing.pages.count;
}

void World::LetGoOf(Side& side, Handle& handle) {
  for (uint64_t page = handle.first; page < handle.end(); ++page) {
    side.pins.remove(handle.context, handle.for_write, handle.how, page,
                     memory_.at(page)->backing(page));
  }
  if (handle.for_write) side.dirty.mark(handle.first, handle.count);
  handle.range.reset();
}

void World::Release(const Operation& o) {
  Side& side = side_of(o);
  if (side.handles.empty()) return;
  const size_t which = o.page % side.handles.size();
  Handle handle = std::move(side.handles[which]);
  side.handles.erase(side.handles.begin() + static_cast<ptrdiff_t>(which));
  last_ = {handle.first, handle.count};
  LetGoOf(side, handle);
}

void World::ReleasePart(const Operation& o) {
  Side& side = side_of(o);
  if (side.handles.empty()) return;
  Handle& handle = side.handles[o.page % side.handles.size()];
  last_ = {handle.first, handle.count};
  const uint64_t at = handle.first + o.extra % (handle.count + 1);
  if (at == kAllPages) return;  // no address
  Handle tail = handle.SplitOff(at);
  if (o.extra % 2 == 0) std::swap(handle, tail);  // so the first part goes
  LetGoOf(side, tail);
  if (handle.count == 0) {
    side.handles.erase(side.handles.begin() + (&handle - side.handles.data()));
  } else if (handle.range.runs().front().iova.start() != Iova(handle.first * kPageSize) ||
             handle.range.runs().back().iova.last().page() != handle.end() - 1) {
    Complain("split_off at page {:#x} kept the wrong part", at);
  }
}

void World::ReopenContext(const Operation& o) {
  Side& side = side_of(o);
  for (const bool write_only : {false, true}) {
    if (!side.pins.held(o.context, write_only, 0, kAllPages).empty()) return;
  }
  side.contexts[o.context].reset();
  side.contexts[o.context] = side.domain->open_context(&side.owners[OwnerOf(o.context)]);
}

}  // namespace mvgpu::domain::model
