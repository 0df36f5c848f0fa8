// Steps that copy bytes.

#include <algorithm>
#include <cstring>
#include <set>

#include "tests/apionly-domain/model/world.h"

namespace mvgpu::domain::model {

namespace {

constexpr uint64_t kMostCopyPages = 3;

struct Bytes {
  uint64_t iova;
  uint64_t size;
  uint64_t first_page() const { return iova / kPageSize; }
  uint64_t pages() const {
    return size == 0 ? 0 : (iova + size - 1) / kPageSize - first_page() + 1;
  }
};

// Somewhere in the first pages; few bytes mostly, up to kMostCopyPages pages now and then.
Bytes BytesAt(uint64_t first_page, const Operation& o) {
  const uint64_t offset = o.extra % 3 == 0 ? 0 : o.extra % kPageSize;
  const uint64_t longest = o.extra % 7 == 0 ? kMostCopyPages * kPageSize - offset : 72;
  return {first_page * kPageSize + offset, (o.extra >> 9) % longest};
}

// 2^64 - iova, or 0 for all of it.
bool Wraps(const Bytes& bytes) {
  return bytes.size == 0 || bytes.iova + bytes.size - 1 < bytes.iova;
}

}  // namespace

template <typename Visit>
void World::ForEachPart(uint64_t iova, uint64_t size, const Visit& visit) const {
  for (uint64_t done = 0; done < size;) {
    const uint64_t page = (iova + done) / kPageSize;
    const uint64_t offset = (iova + done) % kPageSize;
    const uint64_t count = std::min(size - done, kPageSize - offset);
    visit(memory_.at(page)->backing(page), offset, done, count);
    done += count;
  }
}

std::byte* World::TrueBytes(Backing page) {
  return page.file == kNoFile ? vmm_.bytes().at(page).data() : files_.at(page);
}

void World::CompareBytes(uint64_t iova, std::span<const std::byte> got) {
  ForEachPart(iova, got.size(), [&](Backing page, uint64_t offset, uint64_t done, uint64_t count) {
    if (std::memcmp(bytes_.at(page).data() + offset, &got[done], count) != 0) {
      Complain("bytes at iova {:#x} differ", iova + done);
    }
  });
}

void World::TakeOverBytes(uint64_t iova, uint64_t size) {
  ForEachPart(iova, size, [&](Backing page, uint64_t offset, uint64_t, uint64_t count) {
    std::memcpy(bytes_.at(page).data() + offset, TrueBytes(page) + offset, count);
  });
}

void World::Read(const Operation& o) {
  const Side& side = side_of(o);
  const Bytes bytes = BytesAt(PagesOf(o, kMostCopyPages).first, o);
  last_ = {bytes.first_page(), 1};
  Verdict expected = Wraps(bytes) ? Verdict(ErrorCode::kInvalid)
                                  : VerdictOnAccess(side, {bytes.first_page(), bytes.pages()},
                                                    Access::kRead, /*remote=*/true);
  std::vector<std::byte> got(bytes.size);
  vmm_.failed = false;
  const auto read = side.domain->read(Iova(bytes.iova), got);
  if (vmm_.failed && !expected) expected = ErrorCode::kSystem;
  ExpectVerdict(expected, read, "read");
  if (!expected) CompareBytes(bytes.iova, got);
}

void World::Write(const Operation& o) {
  Side& side = side_of(o);
  const Bytes bytes = BytesAt(PagesOf(o, kMostCopyPages).first, o);
  last_ = {bytes.first_page(), 1};
  Verdict expected = Wraps(bytes) ? Verdict(ErrorCode::kInvalid)
                                  : VerdictOnAccess(side, {bytes.first_page(), bytes.pages()},
                                                    Access::kWrite, /*remote=*/true);
  std::vector<std::byte> source(bytes.size);
  for (size_t i = 0; i < source.size(); ++i) source[i] = static_cast<std::byte>(o.extra * 7 + i);
  vmm_.failed = false;
  const auto written = o.page % 4 == 0 ? side.domain->publish(Iova(bytes.iova), source)
                                       : side.domain->write(Iova(bytes.iova), source);
  const bool failed = vmm_.failed && !expected;
  if (failed) expected = ErrorCode::kSystem;
  ExpectVerdict(expected, written, "write");
  if (failed) {
    side.dirty.mark_maybe(bytes.first_page(), bytes.pages());
    return TakeOverBytes(bytes.iova, bytes.size);
  }
  if (expected) return;
  side.dirty.mark(bytes.first_page(), bytes.pages());
  ForEachPart(bytes.iova, bytes.size,
              [&](Backing page, uint64_t offset, uint64_t done, uint64_t count) {
                std::memcpy(bytes_.at(page).data() + offset, &source[done], count);
              });
}

bool World::ShowSameFilePage(uint64_t a, uint64_t b, uint64_t size) const {
  std::set<Backing> pages;
  ForEachPart(a, size, [&](Backing page, uint64_t, uint64_t, uint64_t) { pages.insert(page); });
  bool same = false;
  ForEachPart(b, size,
              [&](Backing page, uint64_t, uint64_t, uint64_t) { same |= pages.contains(page); });
  return same;
}

void World::Copy(const Operation& o) {
  Side& side = side_of(o);
  const Parts all = memory_.all();
  const Bytes from = BytesAt(PagesOf(o, kMostCopyPages).first, o);
  const uint64_t target = all.empty() ? kPlaces[1] : all[o.page % all.size()].first;
  const Bytes to{target * kPageSize + (o.extra >> 5) % kPageSize, from.size};
  last_ = {to.first_page(), 1};
  const bool overlap =
      from.iova <= to.iova + (to.size - 1) && to.iova <= from.iova + (from.size - 1);
  Verdict expected;
  if (Wraps(from) || Wraps(to) || overlap) expected = ErrorCode::kInvalid;
  if (!expected) {
    expected = VerdictOnAccess(side, {from.first_page(), from.pages()}, Access::kRead, true);
  }
  if (!expected) {
    expected = VerdictOnAccess(side, {to.first_page(), to.pages()}, Access::kWrite, true);
  }
  vmm_.failed = false;
  const auto copied = side.domain->copy(Iova(to.iova), Iova(from.iova), from.size);
  const bool failed = vmm_.failed && !expected;
  if (failed) expected = ErrorCode::kSystem;
  ExpectVerdict(expected, copied, "copy");
  if (failed) {
    side.dirty.mark_maybe(to.first_page(), to.pages());
    return TakeOverBytes(to.iova, to.size);
  }
  if (expected) return;
  side.dirty.mark(to.first_page(), to.pages());
  if (ShowSameFilePage(from.iova, to.iova, to.size)) return TakeOverBytes(to.iova, to.size);
  std::vector<std::byte> moved(from.size);
  ForEachPart(from.iova, from.size, [&](Backing page, uint64_t offset, uint64_t done, uint64_t n) {
    std::memcpy(&moved[done], bytes_.at(page).data() + offset, n);
  });
  ForEachPart(to.iova, to.size, [&](Backing page, uint64_t offset, uint64_t done, uint64_t n) {
    std::memcpy(bytes_.at(page).data() + offset, &moved[done], n);
  });
}

void World::ReadPinned(const Operation& o) {
  const Side& side = side_of(o);
  if (side.handles.empty()) return;
  const Handle& handle = side.handles[o.place % side.handles.size()];
  const auto runs = handle.range.runs();
  const PinnedRun& run = runs[o.page % runs.size()];
  last_ = {run.iova.start().page(), 1};
  const Bytes bytes = BytesAt(run.iova.start().page(), o);
  if (Wraps(bytes) || bytes.iova + (bytes.size - 1) > run.iova.last().value()) return;
  std::vector<std::byte> got(bytes.size);
  ExpectVerdict({}, side.domain->read_pinned(run, Iova(bytes.iova), got), "read pinned");
  CompareBytes(bytes.iova, got);
}

}  // namespace mvgpu::domain::model
