// The part of Backing that is about lists of addresses in a DmaSpace.

#include <algorithm>
#include <iterator>
#include <utility>

#include "gpu-model/backing.h"
#include "gpu-model/backing_pieces.h"

namespace mvgpu::gpu {

Backing::Extent Backing::Extent::part(IovaRange listed_part, Iova to, bool translated) const {
  return {.offset = offset + (listed_part.start() - from),
          .iova = IovaRange::FromFirstAndLast(to, to + (listed_part.last() - listed_part.start())),
          .from = listed_part.start(),
          .is_translated = translated};
}

// Whole pages, where the extent has them.
std::vector<Backing::Need> Backing::NeedsOf(const LineBlock& block) const {
  std::vector<Need> needs;
  static_cast<void>(for_each_piece(block, 0, [&](size_t index, IovaRange piece, uint64_t) {
    if (extents_[index].is_translated) return Result<void>();
    const IovaRange pages = *extents_[index].iova.intersection(piece.page_expanded());
    if (!needs.empty() && needs.back().extent == index &&
        pages.start().page() <= needs.back().listed.last().page() + 1) {
      needs.back().listed = IovaRange::FromFirstAndLast(needs.back().listed.start(), pages.last());
    } else {
      needs.push_back({index, pages, {}});
    }
    return Result<void>();
  }));
  return needs;
}

// Goes on after kPending, so that everything is asked for at once.
Result<void> Backing::TranslateFor(const LineBlock& block) {
  if (untranslated_extents_ == 0) return {};
  std::vector<Need> needs = NeedsOf(block);
  Result<void> outcome;
  for (Need& need : needs) {
    auto runs = memory_.space->translate(need.listed, domain::Access::kRead);
    if (runs) {
      need.runs = std::move(*runs);
      continue;
    }
    outcome = tl::unexpected<Error>(std::move(runs).error());
    if (outcome.error().code() != ErrorCode::kPending) return outcome;
  }
  if (outcome && !needs.empty()) Split(std::move(needs));
  return outcome;
}

// Puts extents for the runs in the place of those that were needed; what is left of these stays
// untranslated.
void Backing::Split(std::vector<Need> needs) {
  std::vector<Extent> now;
  now.reserve(extents_.size() + needs.size());
  auto need = needs.begin();
  for (size_t i = 0; i < extents_.size(); ++i) {
    Extent& extent = extents_[i];
    if (need == needs.end() || need->extent != i) {
      now.push_back(std::move(extent));
      continue;
    }
    --untranslated_extents_;
    const auto leave = [&](IovaRange rest) {
      now.push_back(extent.part(rest, rest.start(), false));
      ++untranslated_extents_;
    };
    Iova next = extent.from;
    const Iova last = extent.iova.last();
    bool is_done = false;
    for (; need != needs.end() && need->extent == i; ++need) {
      if (next < need->listed.start()) {
        leave(IovaRange::FromFirstAndLast(next, Iova(need->listed.start().value() - 1)));
      }
      for (const domain::DmaRun& run : need->runs) {
        now.push_back(extent.part(run.from, run.to, true));
      }
      is_done = need->listed.last() == last;
      if (!is_done) next = need->listed.last() + 1;
    }
    if (!is_done) leave(IovaRange::FromFirstAndLast(next, last));
  }
  extents_ = std::move(now);
}

void Backing::forget(IovaRange range) {
  bool has_changed = false;
  for (Extent& extent : extents_) {
    const IovaRange listed = extent.listed();
    if (!extent.is_translated || !listed.overlaps(range)) continue;
    if (extent.is_copied) --unheld_extents_;
    extent = extent.part(listed, listed.start(), false);
    ++untranslated_extents_;
    has_changed = true;
  }
  if (has_changed) MergeUntranslated();
}

// So that extents do not become smaller with each invalidation.
void Backing::MergeUntranslated() {
  size_t kept = 0;
  for (size_t i = 1; i < extents_.size(); ++i) {
    Extent& before = extents_[kept];
    Extent& extent = extents_[i];
    if (!before.is_translated && !extent.is_translated && before.iova.last() < extent.from &&
        extent.from - before.iova.last() == 1) {
      before.iova = IovaRange::FromFirstAndLast(before.from, extent.iova.last());
      --untranslated_extents_;
    } else if (++kept != i) {
      extents_[kept] = std::move(extent);
    }
  }
  extents_.erase(extents_.begin() + static_cast<ptrdiff_t>(kept) + 1, extents_.end());
}

}  // namespace mvgpu::gpu
