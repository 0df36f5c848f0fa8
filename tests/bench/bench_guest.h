#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/base/unique_fd.h"
#include "apionly-domain/container.h"

namespace mvgpu::bench {

// Where a part of guest memory stands: which bytes of which file at which IOVA. Bytes throughout.
struct Placement {
  uint64_t iova;
  uint64_t size;
  size_t file;
  uint64_t offset;
};

// Guest memory as a list of placements, ascending and without neighbours that would merge.
struct Layout {
  std::vector<Placement> placements;
  // What GuestPages below needs to know: where the first part ends, how long the hole behind it is,
  // and how far the pages are apart elsewhere.
  uint64_t low = UINT64_MAX;
  uint64_t hole = 0;
  uint64_t stride = kPageSize;

  // As a VMM lays RAM out: 3/64 of it from 0 on (3 GiB of 64), a hole up to 4/64, then seven more
  // mappings; each in a file of its own.
  static Layout EightMappings(uint64_t memory);
  static Layout OneMapping(uint64_t memory);
  // Memory in `count` mappings without holes, all of one file, which has them in another order.
  static Layout Pieces(uint64_t count, uint64_t size);
  // Pages that lie evenly spread over `memory`, each a mapping: the worst that there is for tables.
  static Layout LonePages(uint64_t count, uint64_t memory);
};

// Numbers the pages of guest memory from 0 on, without the hole.
class GuestPages {
 public:
  GuestPages(uint64_t count, const Layout& layout)
      : count_(count), low_(PagesIn(layout.low)), hole_(layout.hole), stride_(layout.stride) {}
  uint64_t count() const { return count_; }
  Iova iova(uint64_t number) const { return Iova(number * stride_ + (number >= low_ ? hole_ : 0)); }
  // Random ones; the same for the same seed.
  std::vector<Iova> random(size_t count, uint64_t seed) const;
  // One page for each value, evenly spread: for chains in which the next page follows from what the
  // last lookup returned.
  Iova pick(uint64_t value) const {
    const uint64_t mixed = value * 0x9e3779b97f4a7c15u;
    return iova(static_cast<uint64_t>((static_cast<unsigned __int128>(mixed) * count_) >> 64));
  }

 private:
  uint64_t count_;
  uint64_t low_;
  uint64_t hole_;
  uint64_t stride_;
};

// An empty memfd of that size. Checked: a bench without memory measures nothing.
UniqueFd MakeFile(uint64_t size);

// A container with guest memory and one domain. Nothing is told of revocations: nobody unmaps what
// is held.
class Guest final : public domain::PinOwner {
 public:
  Guest(Layout layout, std::unique_ptr<domain::PinBackend> backend,
        domain::Container::Limits limits = {});
  ~Guest() override;
  Guest(const Guest&) = delete;
  Guest& operator=(const Guest&) = delete;

  std::string_view pin_owner_name() const override { return "bench"; }
  void on_revoke(IovaRange) override {}

  domain::Container& container() { return container_; }
  domain::ApiOnlyDomain& domain() { return *domain_; }
  const Layout& layout() const { return layout_; }
  GuestPages pages() const { return {PagesIn(memory_), layout_}; }
  uint64_t iova_pages() const { return PagesIn(memory_ + layout_.hole); }  // hole included
  std::unique_ptr<domain::PinContext> open_context() { return domain_->open_context(this); }
  std::byte* host(Iova iova) const;

  // Random first pages of stretches of `length` pages, each in one mapping.
  std::vector<Iova> random_stretches(size_t count, uint64_t length, uint64_t seed) const;
  // Makes the kernel provide the pages of a range.
  void touch(Iova iova, uint64_t pages);

 private:
  const Layout layout_;
  uint64_t memory_ = 0;
  domain::Container container_;
  std::unique_ptr<domain::ApiOnlyDomain> domain_;
};

// Holds all memory of a guest with one context, page by page: each page is counted for itself, so
// that every pin that follows is a hit.
class DenseHold {
 public:
  explicit DenseHold(Guest& guest);
  domain::PinContext& context() { return *context_; }

 private:
  std::unique_ptr<domain::PinContext> context_;
  std::vector<domain::PinnedRange> held_;  // of the context: goes first
};

}  // namespace mvgpu::bench
