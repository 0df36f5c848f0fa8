// What domains and owners have to do when mappings go.

#include <algorithm>
#include <utility>

#include "tests/apionly-domain/model/world.h"

namespace mvgpu::domain::model {

void World::Revoke(const Parts& parts, const std::vector<int>& domains,
                   const std::function<Result<void>()>& act) {
  std::array<std::array<bool, kOwners>, kSides> must_be_told = {};
  for (uint32_t i = 0; i < kSides; ++i) {
    for (ModelOwner& owner : sides_[i].owners) owner.times_told = 0;
    for (uint32_t c = 0; c < kContexts; ++c) {
      must_be_told[i][OwnerOf(c)] |= sides_[i].pins.holds_any(c, parts);
    }
  }
  const bool refuses = refusing_.refuse_unmap;
  going_ = parts;
  const Result<void> result = act();
  going_.clear();

  Verdict expected;
  for (const int index : domains) {
    if (expected) break;  // those behind were not asked
    if (index == static_cast<int>(kSides)) {
      if (refuses) expected = ErrorCode::kSystem;
    } else {
      const auto i = static_cast<size_t>(index);
      expected = VerdictOnRevocation(sides_[i], must_be_told[i], parts);
    }
  }
  for (const Side& side : sides_) {
    for (const ModelOwner& owner : side.owners) {
      ExpectSame(owner.times_told, 0, owner.name + "'s revocations, which nobody should ask for");
    }
  }
  ExpectVerdict(expected, result, "revocation");
  if (!expected) EndWatches(parts, domains);
}

// Those who held pages were told, once; if one of them still does, that is the end of it.
Verdict World::VerdictOnRevocation(Side& side, const std::array<bool, kOwners>& must_be_told,
                                   const Parts& parts) {
  for (uint32_t k = 0; k < kOwners; ++k) {
    const uint64_t times = must_be_told[k] ? 1 : 0;
    ExpectSame(std::exchange(side.owners[k].times_told, 0), times,
               side.owners[k].name + "'s revocations");
    side.revocations += times;
  }
  for (uint32_t c = 0; c < kContexts; ++c) {
    if (side.pins.holds_any(c, parts)) return ErrorCode::kBusy;
  }
  return {};
}

void World::EndWatches(const Parts& parts, const std::vector<int>& domains) {
  for (const int index : domains) {
    if (index == static_cast<int>(kSides)) continue;
    std::optional<Watch>& watch = sides_[static_cast<size_t>(index)].watch;
    for (const NaiveMapping& part : parts) {
      if (watch && part.first <= watch->page && watch->page < part.end()) watch->is_gone = true;
    }
  }
}

void World::OnRevoke(Side& side, uint32_t owner, IovaRange range) {
  ++side.owners[owner].times_told;
  ExpectSame(range.start().value(), going_.front().first * kPageSize, "start of a revocation");
  ExpectSame(range.last().value(), going_.back().end() * kPageSize - 1, "end of a revocation");
  ExpectClosed(side, owner);
  const Answer answer = side.owners[owner].answer;
  if (answer == Answer::kKeep) return;
  LetGoOfHandles(side, owner, answer == Answer::kLetGoExactly);
  if (answer != Answer::kLetGoOfSome) LetGoOfLoosePages(side, owner);
}

// Nothing new may start in memory that is about to go.
void World::ExpectClosed(Side& side, uint32_t owner) {
  for (const NaiveMapping& part : going_) {
    if (part.file == kNoFile) continue;
    const auto page = testing::MakeRange(part.first * kPageSize, kPageSize);
    TryPin(side, owner == 0 ? 1 : 2, page, Access::kRead);
    ExpectVerdict(ErrorCode::kBusy, side.domain->check(page, Access::kRead), "check while going");
    std::byte byte{};
    ExpectVerdict(ErrorCode::kBusy, side.domain->read(page.last(), {&byte, 1}), "read while going");
    const ApiOnlyDomain::Translator translator(*side.domain);
    if (translator.translate(page.start(), part.access) != nullptr) {
      Complain("iova {:#x} is still translated while it is going", page.start().value());
    }
  }
}

void World::LetGoOfHandles(Side& side, uint32_t owner, bool exactly) {
  const uint64_t first = going_.front().first;
  const uint64_t end = going_.back().end();
  for (size_t i = side.handles.size(); i-- > 0;) {
    Handle& handle = side.handles[i];
    if (OwnerOf(handle.context) != owner || handle.end() <= first || handle.first >= end) continue;
    std::optional<Handle> before;
    std::optional<Handle> behind;
    if (exactly && handle.end() > end) behind = handle.SplitOff(end);
    if (exactly && handle.first < first) {
      Handle inside = handle.SplitOff(first);
      before = std::exchange(handle, std::move(inside));
    }
    LetGoOf(side, handle);
    side.handles.erase(side.handles.begin() + static_cast<ptrdiff_t>(i));
    if (before) side.handles.push_back(std::move(*before));
    if (behind) side.handles.push_back(std::move(*behind));
  }
}

void World::LetGoOfLoosePages(Side& side, uint32_t owner) {
  for (uint32_t context = 0; context < kContexts; ++context) {
    if (OwnerOf(context) != owner) continue;
    for (const bool for_write : {false, true}) {
      std::vector<Iova> list;
      for (const auto& [page, count] : side.pins.counts(context, for_write, How::kLoose)) {
        if (page < going_.front().first || page >= going_.back().end()) continue;
        list.insert(list.end(), count, Iova(page * kPageSize));
      }
      TryUnpin(side, context, for_write, list);
    }
  }
}

}  // namespace mvgpu::domain::model
