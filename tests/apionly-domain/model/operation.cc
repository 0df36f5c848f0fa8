#include "tests/apionly-domain/model/operation.h"

#include <fmt/format.h>

#include <array>
#include <iterator>
#include <random>

namespace mvgpu::domain::model {

namespace {

struct Kind {
  What what;
  std::string_view name;
  uint32_t weight;  // how often, of the sum of all
};
constexpr std::array<Kind, kWhats> kKinds = {{
    {What::kMap, "map", 90},
    {What::kMapOn, "map on", 60},
    {What::kMapAgain, "map again", 6},
    {What::kUnmap, "unmap", 25},
    {What::kUnmapSplit, "unmap and split", 25},
    {What::kUnmapSome, "unmap some", 25},
    {What::kUnmapAll, "unmap all", 4},
    {What::kPin, "pin", 120},
    {What::kRelease, "release", 80},
    {What::kReleasePart, "release a part", 40},
    {What::kPinPages, "pin pages", 70},
    {What::kUnpinPages, "unpin pages", 70},
    {What::kUnpinTooMany, "unpin too many", 12},
    {What::kRead, "read", 30},
    {What::kWrite, "write", 40},
    {What::kCopy, "copy", 25},
    {What::kReadPinned, "read pinned", 15},
    {What::kStartDirtyLog, "start the dirty log", 12},
    {What::kStopDirtyLog, "stop the dirty log", 4},
    {What::kReadDirty, "read dirty", 50},
    {What::kAttach, "attach", 16},
    {What::kDetach, "detach", 8},
    {What::kChangeOwner, "change owner", 20},
    {What::kFailBackend, "fail back end", 15},
    {What::kFailRemote, "fail remote", 6},
    {What::kRefuse, "refuse", 10},
    {What::kReopenContext, "reopen context", 10},
    {What::kWatch, "watch", 20},
}};

uint32_t SumOfWeights() {
  uint32_t sum = 0;
  for (const Kind& kind : kKinds) sum += kind.weight;
  return sum;
}

What PickWhat(uint32_t random) {
  uint32_t left = random % SumOfWeights();
  for (const Kind& kind : kKinds) {
    if (left < kind.weight) return kind.what;
    left -= kind.weight;
  }
  return What::kMap;
}

}  // namespace

std::string_view NameOf(What what) { return kKinds[static_cast<size_t>(what)].name; }

Operation MakeOperation(uint64_t random) {
  std::minstd_rand numbers(static_cast<uint32_t>(random ^ (random >> 32)));
  const auto below = [&numbers](uint32_t limit) {
    return static_cast<uint32_t>(numbers() >> 4) % limit;
  };
  Operation made;
  made.what = PickWhat(below(1u << 20));
  made.domain = below(4) == 0 ? 1 : 0;
  made.context = below(3);
  made.place = below(2) == 0 ? below(3) : below(kPlaceCount);
  made.page = below(40);
  made.file = std::array<uint32_t, 8>{0, 0, 0, 0, 1, 1, 2, 3}[below(8)];
  made.file_page = below(8) == 0 ? kFromTheEnd + below(20) : below(24);
  made.access = std::array<uint32_t, 5>{1, 2, 3, 3, 3}[below(5)];
  made.extra = below(1u << 24);
  const uint32_t size = below(2000);
  if (size == 0) {  // about a chunk of the page directory, in its place or beside it
    made.page = 16 - below(2) * below(3);
    made.pages = static_cast<uint32_t>(kChunkPages) - 2 + below(5);
  } else if (size < 150) {  // about a granule or two; above PinCounts::kLargestDense or not
    made.page = 16 - below(2) * below(3);
    made.pages = 505 + (below(2) == 0 ? below(15) : below(600));
  } else {
    made.pages = 1 + (below(3) == 0 ? below(16) : below(5));
  }
  return made;
}

std::vector<Operation> SimplerThan(const Operation& operation) {
  std::vector<Operation> simpler;
  const auto try_with = [&](uint32_t Operation::*field, uint32_t value) {
    if (operation.*field <= value) return;
    Operation changed = operation;
    changed.*field = value;
    simpler.push_back(changed);
  };
  for (auto field : {&Operation::domain, &Operation::context, &Operation::place, &Operation::page,
                     &Operation::file, &Operation::file_page, &Operation::extra}) {
    try_with(field, 0);
    try_with(field, operation.*field / 2);
    if (operation.*field != 0) try_with(field, operation.*field - 1);
  }
  try_with(&Operation::pages, 1);
  try_with(&Operation::pages, operation.pages / 2 + 1);
  if (operation.pages > 1) try_with(&Operation::pages, operation.pages - 1);
  if (operation.access != 3) {
    simpler.push_back(operation);
    simpler.back().access = 3;
  }
  return simpler;
}

std::string Describe(const Operation& o) {
  return fmt::format(
      "{{{}: domain {}, context {}, place {}, page {}, pages {}, file {}, file page {}{}, access "
      "{}, extra {}}}",
      NameOf(o.what), o.domain, o.context, o.place, o.page, o.pages, o.file,
      o.file_page >= kFromTheEnd ? "end-" : "", o.file_page % kFromTheEnd, o.access, o.extra);
}

}  // namespace mvgpu::domain::model
