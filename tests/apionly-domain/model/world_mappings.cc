// Steps that change what is mapped where.

#include <algorithm>
#include <utility>

#include "tests/apionly-domain/model/world.h"

namespace mvgpu::domain::model {

namespace {

// o.file_page, which may count back from the file's end, and one page too far.
uint64_t FilePageOf(const Operation& o, int file) {
  if (file == kNoFile || o.file_page < kFromTheEnd) return file == kNoFile ? 0 : o.file_page;
  const uint64_t file_pages = kFilePages[static_cast<size_t>(file)];
  const uint64_t back = o.file_page - kFromTheEnd;
  if (file_pages + 1 < o.pages + back) return 0;
  return file_pages + 1 - o.pages - back;
}

int FileOf(const Operation& o) { return o.file >= kFiles ? kNoFile : static_cast<int>(o.file); }

}  // namespace

void World::Map(const Operation& o) {
  const int file = FileOf(o);
  const uint64_t first = kPlaces[o.place % kPlaceCount] + o.page;
  TryMap({first, o.pages, static_cast<Access>(o.access), file, FilePageOf(o, file)},
         o.extra % 64 == 1 ? 1 : 0);
}

void World::MapOn(const Operation& o) {
  const Parts all = memory_.all();
  if (all.empty()) return;
  const NaiveMapping& before = all[o.place % all.size()];
  NaiveMapping wanted = before;
  wanted.first = before.end();
  if (wanted.first == kAllPages) return;  // no address
  wanted.count = o.pages;
  if (o.extra % 4 == 1) {  // another file from its start
    wanted.file = FileOf(o);
    wanted.file_page = 0;
  } else if (before.file != kNoFile) {
    wanted.file_page = before.file_page + before.count;
  }
  TryMap(wanted, 0);
}

void World::MapAgain(const Operation& o) {
  const Parts all = memory_.all();
  if (!all.empty()) TryMap(all[o.place % all.size()], 0);
}

void World::TryMap(const NaiveMapping& wanted, uint64_t misalign) {
  last_ = {wanted.first, wanted.count};
  bool is_there = false;
  Verdict expected = memory_.verdict_on_map(wanted, &is_there);
  if (wanted.file == kReadOnlyFile && Allows(wanted.access, Access::kWrite)) {
    expected = ErrorCode::kPermission;
  }
  if (misalign != 0 || wanted.end() > kAllPages) expected = ErrorCode::kInvalid;
  if (wanted.file != kNoFile &&
      wanted.file_page + wanted.count > kFilePages[static_cast<size_t>(wanted.file)]) {
    expected = ErrorCode::kInvalid;
  }
  if (!expected && !is_there && refusing_.attached && refusing_.refuse_map) {
    expected = ErrorCode::kSystem;
  }
  UniqueFd fd = wanted.file == kNoFile ? UniqueFd() : files_.duplicate(wanted.file);
  const auto mapped =
      container_.map({Iova(wanted.first * kPageSize), wanted.count * kPageSize - misalign,
                      wanted.access, std::move(fd), wanted.file_page * kPageSize});
  ExpectVerdict(expected, mapped, "map");
  if (!expected && !is_there) memory_.add(wanted);
}

void World::Unmap(const Operation& o, bool may_split) {
  const Parts all = memory_.all();
  Pages pages = PagesOf(o, kAllPages);
  if (!all.empty() && o.extra % 4 == 0) {
    const NaiveMapping& mapping = all[o.place % all.size()];
    pages = {mapping.first, mapping.count};
  }
  TryUnmap(pages, may_split, o.extra % 64 == 1 ? 1 : 0);
}

void World::UnmapSome(const Operation& o) {
  const Parts all = memory_.all();
  if (all.empty()) return;
  const size_t a = o.place % all.size();
  const size_t b = o.page % all.size();
  const uint64_t first = all[std::min(a, b)].first;
  TryUnmap({first, all[std::max(a, b)].end() - first}, /*may_split=*/false, 0);
}

void World::TryUnmap(Pages pages, bool may_split, uint64_t misalign) {
  last_ = pages;
  Verdict expected;
  Parts parts = memory_.going(pages.first, pages.count, may_split, &expected);
  if (misalign != 0 || pages.count == kAllPages) expected = ErrorCode::kInvalid;
  if (expected) parts.clear();
  Result<uint64_t> unmapped = 0;
  const auto unmap = [&] {
    unmapped = container_.unmap(Iova(pages.first * kPageSize), pages.count * kPageSize - misalign,
                                may_split ? Container::Cut::kSplit : Container::Cut::kRefuse);
    return unmapped;
  };
  if (expected || parts.empty()) {
    ExpectVerdict(expected, unmap(), "unmap");
  } else {
    Revoke(parts, domains_, [&] { return unmap().map([](uint64_t) {}); });
    if (unmapped) memory_.remove(parts);
  }
  uint64_t bytes = 0;
  for (const NaiveMapping& part : parts) bytes += part.count * kPageSize;
  if (unmapped) ExpectSame(*unmapped, bytes, "bytes unmapped");
}

void World::UnmapAll() {
  const Parts parts = memory_.all();
  if (parts.empty()) {
    ExpectVerdict({}, container_.unmap_all(), "unmap all of nothing");
    return;
  }
  last_ = {parts.front().first, parts.back().end() - parts.front().first};
  Result<uint64_t> unmapped = 0;
  Revoke(parts, domains_, [&] {
    unmapped = container_.unmap_all();
    return unmapped.map([](uint64_t) {});
  });
  if (unmapped) memory_.remove(parts);
}

void World::Attach(const Operation& o) {
  const bool other = o.domain >= kSides || o.extra % 8 == 1;
  const int index = static_cast<int>(other ? kSides : o.domain);
  if (std::find(domains_.begin(), domains_.end(), index) != domains_.end()) return;
  const bool refuses = other && refusing_.refuse_map && memory_.pieces() != 0;
  const Verdict expected = refuses ? Verdict(ErrorCode::kSystem) : Verdict();
  ExpectVerdict(expected, container_.attach(DomainAt(index)), "attach");
  if (expected) return;
  domains_.push_back(index);
  (other ? refusing_.attached : sides_[o.domain].attached) = true;
}

void World::Detach(const Operation& o) {
  const bool other = o.domain >= kSides || o.extra % 8 == 1;
  const int index = static_cast<int>(other ? kSides : o.domain);
  const auto position = std::find(domains_.begin(), domains_.end(), index);
  if (position == domains_.end()) return;
  const Parts parts = memory_.all();
  bool detached = false;
  const auto detach = [&] {
    auto result = container_.detach(DomainAt(index));
    detached = result.has_value();
    return result;
  };
  if (parts.empty()) {
    ExpectVerdict({}, detach(), "detach");
  } else {
    last_ = {parts.front().first, parts.back().end() - parts.front().first};
    Revoke(parts, {index}, detach);
  }
  if (!detached) return;
  domains_.erase(position);
  (other ? refusing_.attached : sides_[o.domain].attached) = false;
}

}  // namespace mvgpu::domain::model
