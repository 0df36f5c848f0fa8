// What can be seen from outside, compared with the model.

#include <algorithm>
#include <cstring>

#include "tests/apionly-domain/model/world.h"

namespace mvgpu::domain::model {

void World::Compare(bool thoroughly) {
  CompareContainer();
  for (Side& side : sides_) CompareSide(side, thoroughly);
  if (!thoroughly) return;
  for (const auto& [page, bytes] : bytes_.pages()) {
    if (std::memcmp(TrueBytes(page), bytes.data(), bytes.size()) != 0) {
      Complain("bytes of page {} of file {} differ", page.page, page.file);
    }
  }
}

void World::CompareContainer() {
  const Container::Totals totals = container_.totals();
  ExpectSame(totals.mappings, memory_.pieces(), "mappings");
  ExpectSame(totals.merged_mappings, memory_.merged(), "merged mappings");
  ExpectSame(totals.mapped_pages, memory_.pages(), "mapped pages");
  ExpectSame(totals.reachable_pages, memory_.file_pages(), "reachable pages");
  ExpectSame(totals.files, memory_.files(), "files");
  ExpectSame(container_.unsealed_files_seen(), 0, "unsealed files");
  if (refusing_.attached) ExpectSame(refusing_.pages, memory_.pages(), "pages told");
  const std::vector<Mapping> got = container_.mappings();
  const Parts expected = memory_.all();
  for (size_t i = 0; i < got.size() && i < expected.size(); ++i) {
    const Mapping& m = got[i];
    const NaiveMapping same{m.iova.start().page(), m.pages(), m.access,
                            m.file == nullptr ? kNoFile : files_.file_of(m.file->identity().inode),
                            m.file_offset / kPageSize};
    if (same != expected[i]) {
      Complain(
          "the mapping at page {:#x} (of {}, file {} from page {} on) should be that at {:#x} "
          "(of {}, file {} from page {} on)",
          same.first, same.count, same.file, same.file_page, expected[i].first, expected[i].count,
          expected[i].file, expected[i].file_page);
    }
  }
}

void World::CompareSide(Side& side, bool thoroughly) {
  const ApiOnlyDomain::Counters counters = side.domain->counters();
  const uint64_t unique = side.pins.backing().size();
  ExpectSame(counters.mapped_pages, side.attached ? memory_.file_pages() : 0, "mapped pages");
  ExpectSame(counters.pinned_pages, side.pins.pinned(), "pinned pages");
  ExpectSame(counters.unique_pages, unique, "unique pages");
  ExpectSame(counters.locked_pages, unique, "locked pages");
  ExpectSame(side.backend->pages.size(), unique, "pages of the back end");
  ExpectSame(counters.peak_unique_pages, side.peak, "peak of unique pages");
  ExpectSame(counters.pages_pinned, side.pages_pinned, "pages pinned ever");
  ExpectSame(counters.pages_locked_first, side.first_locks, "pages locked first ever");
  ExpectSame(counters.revocations, side.revocations, "revocations ever");
  if (!side.backend->problem.empty()) Complain("back end: {}", side.backend->problem);
  for (const uint64_t page : {last_.first - 1, last_.first, last_.first + 1, last_.end() - 1,
                              last_.end(), last_.first ^ (steps_ % 64)}) {
    CompareAddress(side, page % kAllPages);
  }
  CompareHolders(side, last_);
  CompareWatch(side);
  if (!thoroughly || unique != side.backend->pages.size()) return;
  for (const auto& [inode, page] : side.backend->pages) {
    if (!side.pins.backing().contains({files_.file_of(inode), page})) {
      Complain("page {} of file {} is held by the back end only", page, files_.file_of(inode));
    }
  }
  CompareHolders(side, {0, kAllPages});
}

void World::CompareAddress(Side& side, uint64_t page) {
  const auto range = testing::MakeRange(page * kPageSize, kPageSize);
  for (const Access access : {Access::kRead, Access::kWrite, Access::kReadWrite}) {
    const Verdict expected = VerdictOnAccess(side, {page, 1}, access, /*remote=*/false);
    ExpectVerdict(expected, side.domain->check(range, access), "check");
    const Iova iova = range.start() + steps_ * 977 % kPageSize;
    const std::byte* host = ApiOnlyDomain::Translator(*side.domain).translate(iova, access);
    const std::byte* should = nullptr;
    if (!expected) should = HostOf(memory_.at(page)->backing(page)) + iova.offset_in_page();
    if (host != should) Complain("iova {:#x} is translated to another place", iova.value());
  }
}

void World::CompareHolders(Side& side, Pages pages) {
  using Row = std::tuple<std::string, uint64_t, uint64_t>;  // owner, pages, first IOVA
  std::vector<Row> expected;
  for (uint32_t context = 0; context < kContexts; ++context) {
    const auto held = side.pins.held(context, /*only_for_write=*/false, pages.first, pages.end());
    if (held.empty()) continue;
    expected.emplace_back(side.owners[OwnerOf(context)].name, held.size(),
                          *held.begin() * kPageSize);
  }
  std::vector<Row> got;
  const auto range =
      IovaRange::FromFirstAndLast(Iova(pages.first * kPageSize), Iova(pages.end() * kPageSize - 1));
  for (const ApiOnlyDomain::Holder& holder : side.domain->holders(range)) {
    got.emplace_back(holder.owner, holder.pages, holder.first.value());
  }
  std::sort(got.begin(), got.end());
  std::sort(expected.begin(), expected.end());
  if (got != expected) {
    Complain("{} holders of page {:#x} and {} behind, where the model has {} or others", got.size(),
             pages.first, pages.count - 1, expected.size());
  }
}

void World::SetWatch(const Operation& o) {
  Side& side = side_of(o);
  const uint64_t page = PagesOf(o, 1).first;
  last_ = {page, 1};
  if (VerdictOnAccess(side, last_, Access::kRead, /*remote=*/false)) return;
  const ApiOnlyDomain::Translator translator(*side.domain);
  const Iova iova(page * kPageSize);
  side.watch = Watch{page, translator.generation(iova), translator.translate(iova, Access::kRead)};
}

void World::CompareWatch(Side& side) {
  if (!side.watch) return;
  const ApiOnlyDomain::Translator translator(*side.domain);
  const Iova iova(side.watch->page * kPageSize);
  const bool is_same = translator.generation(iova) == side.watch->generation;
  if (is_same && side.watch->is_gone) {
    Complain("iova {:#x} was unmapped and keeps its generation", iova.value());
  }
  if (is_same && translator.translate(iova, Access::kRead) != side.watch->host) {
    Complain("iova {:#x} has another translation of the same generation", iova.value());
  }
}

}  // namespace mvgpu::domain::model
