#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "apionly-domain/base/address.h"
#include "tests/bench/bench_guest.h"

namespace mvgpu::bench {

// A model of how libvfio-user (efd091b) translates: regions in a B-tree of page-sized nodes keyed
// by last byte, whose keys are compared one after the other, with a thread-local hint (last region,
// generation) in front; vfu_addr_to_sgl() finds the region, vfu_sgl_get() computes base + offset,
// vfu_sgl_put() looks whether the dirty log is on. Nothing is pinned or counted.
//
// Calibration: compiled with -O2 and called in the same way, on one machine and in one minute, the
// real one took 6.6, 24 and 64 ns for a random page with 1, 8 and 1024 regions, the model 4.7, 21
// and 45. (Elsewhere the real one took 7.3, 32 and 74 ns, and 32 ns for one call for 256 KiB with 8
// regions.) So a row that is met against the model is met against the original. The rows
// "libvfio-user model" show what the model takes.
class RegionTree {
 public:
  struct Region {
    uint64_t start;
    uint64_t end;
    uint64_t host;
    uint32_t rights;
    bool mapped;
  };
  struct Segment {
    uint64_t start;
    const Region* region;
    uint64_t length;
    uint64_t offset;
    bool writeable;
  };

  explicit RegionTree(const Layout& layout);

  // Three calls into a library, hence not inlined. `locate` answers false for a hole.
  [[gnu::noinline]] bool locate(uint64_t iova, uint64_t length, Segment* segment) const;
  [[gnu::noinline]] bool get(const Segment& segment, iovec* piece) const;
  [[gnu::noinline]] void put(const Segment& segment);

  // get + put of [iova, iova + length); what was found, as a number.
  uint64_t map_and_unmap(Iova iova, uint64_t length) {
    Segment segment;
    iovec piece = {};
    if (!locate(iova.value(), length, &segment) || !get(segment, &piece)) return 0;
    put(segment);
    return reinterpret_cast<uint64_t>(piece.iov_base);
  }

 private:
  static constexpr size_t kNodeKeys = 170;  // (4096 - 16) / 24
  struct alignas(256) Node {
    size_t count = 0;
    uint64_t keys[kNodeKeys];
    const void* values[kNodeKeys];  // of a leaf: regions; of the root: leaves
  };
  // A place in the tree, kept as an address with the position in the low bits for each level. Its
  // functions are calls in the original too.
  class Cursor {
   public:
    [[gnu::noinline]] Cursor(const RegionTree& tree, uint64_t iova);
    // Null behind the last region.
    [[gnu::noinline]] const Region* get() const;
    [[gnu::noinline]] const Region* next();

   private:
    static uint64_t At(const Node& node, uint64_t key);
    static const Node& NodeOf(uint64_t level) {
      return *reinterpret_cast<const Node*>(level & ~255);
    }
    static size_t PositionOf(uint64_t level) { return level & 255; }
    const RegionTree& tree_;
    uint64_t levels_[8];  // the leaf is 0
  };
  // The first lookup, or after one elsewhere.
  [[gnu::noinline]] int Split(uint64_t iova, uint64_t length, Segment* segment) const;

  std::vector<Region> regions_;
  std::vector<std::unique_ptr<Node>> leaves_;
  Node root_;
  size_t height_ = 1;  // 1: the only leaf; 2: the root and its leaves
  uint64_t generation_ = 1;
  uint64_t dirty_page_size_ = 0;
  uint64_t marks_ = 0;
};

}  // namespace mvgpu::bench
