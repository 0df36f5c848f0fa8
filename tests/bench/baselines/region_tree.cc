#include "tests/bench/baselines/region_tree.h"

#include <algorithm>

namespace mvgpu::bench {

namespace {

thread_local const RegionTree::Region* hint = nullptr;
thread_local const RegionTree* hint_of = nullptr;
thread_local uint64_t hint_generation = 0;

constexpr uint64_t kHostBase = 0x7f0000000000;

bool InitSegment(const RegionTree::Region& region, uint64_t iova, uint64_t length,
                 RegionTree::Segment* segment) {
  if ((region.rights & 2) == 0) return false;
  *segment = {region.start, &region, length, iova - region.start, true};
  return true;
}

}  // namespace

RegionTree::RegionTree(const Layout& layout) {
  // Not that of a tree that was at this address before: the hint may still point into it.
  static uint64_t trees = 0;
  generation_ = ++trees;
  for (const Placement& part : layout.placements) {
    regions_.push_back({part.iova, part.iova + part.size, kHostBase + part.iova, 3, true});
  }
  // Regions that come in ascending order leave each node half full when it is split.
  const size_t fill = regions_.size() <= kNodeKeys ? kNodeKeys : kNodeKeys / 2;
  for (const Region& region : regions_) {
    if (leaves_.empty() || leaves_.back()->count == fill) {
      leaves_.push_back(std::make_unique<Node>());
      root_.values[root_.count++] = leaves_.back().get();
    }
    Node& leaf = *leaves_.back();
    leaf.values[leaf.count] = &region;
    leaf.keys[leaf.count++] = region.end - 1;
    root_.keys[root_.count - 1] = region.end - 1;
  }
  height_ = leaves_.size() == 1 ? 1 : 2;
}

RegionTree::Cursor::Cursor(const RegionTree& tree, uint64_t iova) : tree_(tree) {
  const Node* node = tree.height_ == 1 ? tree.leaves_.front().get() : &tree.root_;
  for (size_t level = tree.height_; level-- > 0;) {
    levels_[level] = At(*node, iova);
    const size_t position = PositionOf(levels_[level]);
    if (level == 0 || position == node->count) continue;
    node = static_cast<const Node*>(node->values[position]);
  }
}

uint64_t RegionTree::Cursor::At(const Node& node, uint64_t key) {
  size_t position = 0;
  while (position < node.count && node.keys[position] < key) ++position;
  return reinterpret_cast<uint64_t>(&node) | position;
}

const RegionTree::Region* RegionTree::Cursor::get() const {
  const Node& leaf = NodeOf(levels_[0]);
  const size_t position = PositionOf(levels_[0]);
  return position == leaf.count ? nullptr : static_cast<const Region*>(leaf.values[position]);
}

const RegionTree::Region* RegionTree::Cursor::next() {
  size_t level = 0;
  while (level < tree_.height_ && PositionOf(levels_[level]) == NodeOf(levels_[level]).count) {
    ++level;
  }
  if (level == tree_.height_) return nullptr;
  ++levels_[level];
  for (; level > 0; --level) {
    const size_t position = PositionOf(levels_[level]);
    if (position == NodeOf(levels_[level]).count) return nullptr;
    levels_[level - 1] = reinterpret_cast<uint64_t>(NodeOf(levels_[level]).values[position]);
  }
  return get();
}

int RegionTree::Split(uint64_t iova, uint64_t length, Segment* segment) const {
  int pieces = 0;
  for (Cursor cursor(*this, iova); length > 0; cursor.next()) {
    const Region* region = cursor.get();
    if (region == nullptr || iova < region->start || iova >= region->end) return -1;
    const uint64_t here = std::min(region->end - iova, length);
    if (pieces++ == 0 && !InitSegment(*region, iova, here, segment)) return -1;
    iova += here;
    length -= here;
  }
  return pieces;
}

bool RegionTree::locate(uint64_t iova, uint64_t length, Segment* segment) const {
  const uint64_t generation = __atomic_load_n(&generation_, __ATOMIC_ACQUIRE);
  if (hint_generation == generation && hint_of == this && length > 0 && iova >= hint->start &&
      iova + length <= hint->end) {
    return InitSegment(*hint, iova, length, segment);
  }
  if (Split(iova, length, segment) != 1) return false;
  hint = segment->region;
  hint_of = this;
  hint_generation = generation;
  return true;
}

bool RegionTree::get(const Segment& segment, iovec* piece) const {
  if (segment.region == nullptr || !segment.region->mapped) return false;
  *piece = {reinterpret_cast<void*>(segment.region->host + segment.offset), segment.length};
  return true;
}

void RegionTree::put(const Segment& segment) {
  if (segment.writeable && dirty_page_size_ != 0) ++marks_;
}

}  // namespace mvgpu::bench
