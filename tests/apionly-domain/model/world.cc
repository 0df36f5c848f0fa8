#include "tests/apionly-domain/model/world.h"

#include <algorithm>

#include "tests/fakes/guest_ram.h"

namespace mvgpu::domain::model {

namespace {

constexpr uint64_t kSmallPinLimit = 30;  // of the second domain

}  // namespace

World::World(GuestFiles* files)
    : files_(*files),
      container_(Container::Limits{.max_mappings = NaiveMemory::kMostMerged,
                                   .max_pieces = NaiveMemory::kMostPieces,
                                   .max_mapped_bytes = NaiveMemory::kMostFilePages * kPageSize}) {
  files_.Empty();
  for (uint32_t i = 0; i < kSides; ++i) {
    Side& side = sides_[i];
    if (i == 1) side.pin_limit = kSmallPinLimit;
    ApiOnlyDomain::Options options{.name = fmt::format("domain {}", i),
                                   .pin_limit_pages = side.pin_limit,
                                   .unmap_deadline = std::chrono::milliseconds(0),
                                   .remote = &vmm_};
    side.domain = std::move(*ApiOnlyDomain::Create(
        std::move(options), std::make_unique<StrictBackend>(side.backend), nullptr, nullptr));
    for (uint32_t k = 0; k < kOwners; ++k) {
      side.owners[k].name = fmt::format("owner {} of domain {}", k, i);
      side.owners[k].told = [this, &side, k](IovaRange range) { OnRevoke(side, k, range); };
    }
    for (uint32_t k = 0; k < kContexts; ++k) {
      side.contexts[k] = side.domain->open_context(&side.owners[OwnerOf(k)]);
    }
  }
  Attach({.what = What::kAttach, .domain = 0});
}

void World::Step(const Operation& o) {
  last_ = {kPlaces[o.place % kPlaceCount] + o.page, 1};
  Side& side = side_of(o);
  switch (o.what) {
    case What::kMap:
      Map(o);
      break;
    case What::kMapOn:
      MapOn(o);
      break;
    case What::kMapAgain:
      MapAgain(o);
      break;
    case What::kUnmap:
      Unmap(o, /*may_split=*/false);
      break;
    case What::kUnmapSplit:
      Unmap(o, /*may_split=*/true);
      break;
    case What::kUnmapSome:
      UnmapSome(o);
      break;
    case What::kUnmapAll:
      UnmapAll();
      break;
    case What::kPin:
      Pin(o);
      break;
    case What::kRelease:
      Release(o);
      break;
    case What::kReleasePart:
      ReleasePart(o);
      break;
    case What::kPinPages:
      PinPages(o);
      break;
    case What::kUnpinPages:
      UnpinPages(o);
      break;
    case What::kUnpinTooMany:
      UnpinTooMany(o);
      break;
    case What::kRead:
      Read(o);
      break;
    case What::kWrite:
      Write(o);
      break;
    case What::kCopy:
      Copy(o);
      break;
    case What::kReadPinned:
      ReadPinned(o);
      break;
    case What::kStartDirtyLog:
      side.domain->start_dirty_log();
      side.dirty = {.on = true, .marked = {}, .maybe = {}};
      break;
    case What::kStopDirtyLog:
      side.domain->stop_dirty_log();
      side.dirty = {};
      break;
    case What::kReadDirty:
      ReadDirty(o);
      break;
    case What::kAttach:
      Attach(o);
      break;
    case What::kDetach:
      Detach(o);
      break;
    case What::kChangeOwner:
      side.owners[OwnerOf(o.context)].answer = static_cast<Answer>(o.extra % kAnswers);
      break;
    case What::kFailBackend:
      side.backend->fail_at_call = 1 + o.extra % 5;
      break;
    case What::kFailRemote:
      vmm_.fail_at_call = 1 + o.extra % 3;
      break;
    case What::kRefuse:
      (o.extra % 2 == 0 ? refusing_.refuse_map : refusing_.refuse_unmap) = true;
      break;
    case What::kReopenContext:
      ReopenContext(o);
      break;
    case What::kWatch:
      SetWatch(o);
      break;
  }
  last_.count = std::min(last_.count, kAllPages - last_.first);
  if (problem_.empty()) Compare(/*thoroughly=*/++steps_ % 32 == 0);
}

void World::Finish() {
  refusing_.refuse_unmap = false;
  for (Side& side : sides_) {
    for (ModelOwner& owner : side.owners) owner.answer = Answer::kLetGo;
  }
  UnmapAll();
  Compare(/*thoroughly=*/true);
  ExpectSame(memory_.pieces(), 0, "mappings at the end");
  for (uint32_t i = 0; i <= kSides; ++i) Detach({.what = What::kDetach, .domain = i});
  for (Side& side : sides_) {
    ExpectSame(side.pins.pinned(), 0, "pins at the end");
    ExpectSame(side.backend->pages.size(), 0, "pages of the back end at the end");
  }
}

World::Pages World::PagesOf(const Operation& o, uint64_t at_most) const {
  const uint64_t count = std::min<uint64_t>(o.pages, at_most);
  const Parts all = memory_.all();
  if (o.extra % 8 == 7 || all.empty()) {
    const uint64_t first = kPlaces[o.place % kPlaceCount] + o.page;
    return {first, std::min(count, kAllPages - first)};
  }
  const NaiveMapping& mapping = all[o.place % all.size()];
  const uint64_t skip = mapping.count > count && o.extra % 16 < 8 ? mapping.count - count : 0;
  const uint64_t first = mapping.first + std::max(o.page % mapping.count, skip);
  return {first, std::min(count, kAllPages - first)};
}

std::byte* World::HostOf(Backing backing) const {
  for (const Mapping& mapping : container_.mappings()) {
    if (mapping.file != nullptr && files_.file_of(mapping.file->identity().inode) == backing.file) {
      return mapping.file->host_address(backing.page * kPageSize);
    }
  }
  return nullptr;
}

Verdict World::VerdictOnAccess(const Side& side, Pages pages, Access access, bool remote) const {
  if (!side.attached) return ErrorCode::kNotMapped;
  return memory_.verdict_on_access(pages.first, pages.count, access, remote, going_);
}

Domain* World::DomainAt(int index) {
  if (index == static_cast<int>(kSides)) return &refusing_;
  return sides_[static_cast<size_t>(index)].domain.get();
}

}  // namespace mvgpu::domain::model
