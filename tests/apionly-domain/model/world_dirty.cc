// The step that reads the dirty log.

#include <algorithm>

#include "tests/apionly-domain/model/world.h"

namespace mvgpu::domain::model {

namespace {

constexpr uint64_t kBitCounts[] = {1, 2, 3, 5, 64, 255, 256, 257, 1000};
constexpr uint64_t kUntouched = 0xa5a5a5a5a5a5a5a5;  // what the bitmap says where nothing is set

bool BitOf(std::span<const uint64_t> bitmap, uint64_t bit) {
  return (bitmap[bit / 64] >> bit % 64 & 1) != 0;
}

}  // namespace

void World::ReadDirty(const Operation& o) {
  Side& side = side_of(o);
  const uint64_t bit_pages = uint64_t{1} << o.extra % 9;  // 4 KiB to 1 MiB
  const uint64_t near = PagesOf(o, 1).first;
  const uint64_t first = near / bit_pages * bit_pages;
  const uint64_t bits =
      std::min(kBitCounts[(o.extra >> 8) % std::size(kBitCounts)], (kAllPages - first) / bit_pages);
  const Pages pages{first, bits * bit_pages};
  last_ = pages;
  Verdict expected = side.dirty.on ? Verdict() : Verdict(ErrorCode::kInvalid);
  uint64_t bit_size = bit_pages * kPageSize;
  std::vector<uint64_t> bitmap((bits + 63) / 64 + 1, 0);
  bitmap.back() = kUntouched;
  auto range = testing::MakeRange(first * kPageSize, pages.count * kPageSize);
  std::span<uint64_t> words = bitmap;
  switch ((o.extra >> 12) % 32) {  // now and then something that makes no sense
    case 0:
      bit_size += kPageSize / 2;
      expected = ErrorCode::kInvalid;
      break;
    case 1:
      bit_size = kPageSize / 2;
      expected = ErrorCode::kInvalid;
      break;
    case 2:
      range = testing::MakeRange(first * kPageSize, pages.count * kPageSize - 1);
      expected = ErrorCode::kInvalid;
      break;
    case 3:
      words = words.first((bits - 1) / 64);
      expected = ErrorCode::kInvalid;
      break;
    default:
      break;
  }
  const auto how = o.access == 1 ? DirtyLog::Read::kKeep : DirtyLog::Read::kClear;
  ExpectVerdict(expected, side.domain->read_dirty(range, bit_size, how, words), "read dirty");
  if (expected) return;
  CompareDirty(side, pages, bit_pages, bitmap);
  if (how == DirtyLog::Read::kClear) side.dirty.forget(pages.first, pages.end());
}

void World::CompareDirty(Side& side, Pages pages, uint64_t bit_pages,
                         std::span<const uint64_t> bitmap) {
  std::set<uint64_t> must;  // bits
  std::set<uint64_t> may;
  const auto add = [&](const std::set<uint64_t>& marks, std::set<uint64_t>* bits) {
    for (auto it = marks.lower_bound(pages.first); it != marks.end() && *it < pages.end(); ++it) {
      bits->insert((*it - pages.first) / bit_pages);
    }
  };
  add(side.dirty.marked, &must);
  add(side.dirty.maybe, &may);
  for (uint32_t context = 0; context < kContexts; ++context) {
    add(side.pins.held(context, /*only_for_write=*/true, pages.first, pages.end()), &must);
  }
  for (uint64_t bit = 0; bit < pages.count / bit_pages; ++bit) {
    if (must.contains(bit) && !BitOf(bitmap, bit)) Complain("dirty bit {} is missing", bit);
    if (!must.contains(bit) && !may.contains(bit) && BitOf(bitmap, bit)) {
      Complain("dirty bit {} is set, but nothing was written", bit);
    }
  }
  for (uint64_t bit = pages.count / bit_pages; bit < (bitmap.size() - 1) * 64; ++bit) {
    if (BitOf(bitmap, bit)) Complain("dirty bit {} beyond the last one is set", bit);
  }
  ExpectSame(bitmap.back(), kUntouched, "the word behind the dirty bits");
}

}  // namespace mvgpu::domain::model
