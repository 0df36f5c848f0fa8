#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "apionly-domain/base/address.h"

namespace mvgpu::bench {

inline constexpr size_t kBatch = 64;

// Random pages, a part for each round: the pages of a round are not in a cache because of the round
// before. Both sides of a comparison get the same part.
class PageSlices {
 public:
  // REQUIRES: at least `per_round` pages.
  PageSlices(std::vector<Iova> pages, uint64_t per_round)
      : pages_(std::move(pages)), per_round_(per_round / kBatch * kBatch) {}

  std::span<const Iova> all() const { return pages_; }
  uint64_t per_round() const { return per_round_; }
  std::span<const Iova> round(uint64_t number) const {
    const uint64_t parts = pages_.size() / per_round_;
    return std::span(pages_).subspan(number % parts * per_round_, per_round_);
  }
  // Calls visit(batch) for each batch of `size` pages of a round. REQUIRES: size divides kBatch.
  template <typename Visit>
  void for_each_batch(uint64_t number, size_t size, Visit visit) const {
    const std::span<const Iova> all = round(number);
    for (size_t done = 0; done < all.size(); done += size) visit(all.subspan(done, size));
  }

 private:
  std::vector<Iova> pages_;
  uint64_t per_round_;
};

}  // namespace mvgpu::bench
