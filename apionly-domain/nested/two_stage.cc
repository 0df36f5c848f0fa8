#include "apionly-domain/nested/two_stage.h"

#include <algorithm>

namespace mvgpu::domain {

tl::expected<void, Fault> StageTwoTables::load(uint64_t address, std::span<uint64_t> words) const {
  const WalkResult place = stage2_.walk(root_, address, Access::kRead);
  if (!place) return tl::unexpected(place.error());
  return memory_.load(place->out, words);  // within a page: what is contiguous stays so
}

tl::expected<uint64_t, Fault> StageTwoTables::compare_exchange(uint64_t address, uint64_t expected,
                                                               uint64_t desired) const {
  const WalkResult place = stage2_.walk(root_, address, Access::kReadWrite);
  if (!place) return tl::unexpected(place.error());
  return memory_.compare_exchange(place->out, expected, desired);
}

WalkResult TwoStageWalker::walk(uint64_t root, uint64_t address, Wanted wanted) const {
  const WalkResult first = stage1_.walk(root, address, wanted);
  if (!first) return first;
  const WalkResult second = stage2_.walk(stage2_root_, first->out, wanted);
  if (!second) {
    Fault fault = second.error();
    fault.device_address = address;
    return tl::unexpected(fault);
  }
  return Leaf{second->out, std::min(first->span, second->span),
              static_cast<Rights>(first->rights & second->rights),
              static_cast<Rights>(first->marked & second->marked)};
}

Stretch TwoStageWalker::walk_pages(uint64_t root, uint64_t address,
                                   std::span<PageWord> words) const {
  Stretch stretch = stage1_.walk_pages(root, address, words);
  if (stretch.is_hole) return stretch;
  Known known;
  for (uint64_t i = 0; i < stretch.pages; ++i) {
    if (words[i] == 0) continue;
    const auto word = Through(words[i], &known);
    if (!word) {
      Fault fault = word.error();
      fault.device_address = address + BytesIn(i);
      return {.pages = i, .fault = fault, .fault_pages = 1};
    }
    words[i] = *word;
  }
  return stretch;
}

tl::expected<PageWord, Fault> TwoStageWalker::Through(PageWord word, Known* known) const {
  const uint64_t address = FrameOf(word).value();
  const Rights wanted = RightsOf(AccessOf(word));
  if (!known->answers(address, wanted)) {
    const WalkResult leaf = Allowed(address, wanted);
    if (!leaf && leaf.error().code == FaultCode::kNotPresent) return PageWord{0};
    if (!leaf) return tl::unexpected(leaf.error());
    *known = {address & ~(leaf->span - 1), *leaf, wanted};
    known->leaf.out &= ~(leaf->span - 1);
  }
  return MakePageWord(known->leaf.out + (address - known->start), known->leaf.rights & wanted);
}

// With as much of the rights as stage 2 allows, so that its flags are kept for those.
WalkResult TwoStageWalker::Allowed(uint64_t address, Rights rights) const {
  const WalkResult all = stage2_.walk(stage2_root_, address, Wanted(rights, false));
  if (all || (all.error().code != FaultCode::kNoRead && all.error().code != FaultCode::kNoWrite)) {
    return all;
  }
  const WalkResult there = stage2_.walk(stage2_root_, address, {});
  if (!there || (there->rights & rights) == 0) return there;
  return stage2_.walk(stage2_root_, address,
                      Wanted(static_cast<Rights>(there->rights & rights), false));
}

}  // namespace mvgpu::domain
