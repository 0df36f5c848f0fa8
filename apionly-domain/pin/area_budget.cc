#include "apionly-domain/pin/area_budget.h"

#include <algorithm>
#include <bit>

namespace mvgpu::domain {

namespace {

// The granule that cuts `pages` into at most half as many pieces as there are areas.
uint64_t CoveringGranule(uint64_t pages, uint64_t areas) {
  return std::bit_ceil((2 * pages + areas - 1) / areas);
}

}  // namespace

uint64_t AreaBudget::granule(uint64_t areas_in_use, uint64_t total_file_pages) const {
  const uint64_t exact = areas_ / 2;
  if (areas_in_use < exact) return 1;
  if (areas_in_use >= tight()) {
    const uint64_t left = areas_ - std::min(areas_in_use, areas_ - 1);
    return CoveringGranule(total_file_pages, left);
  }
  const uint64_t coarsest = CoveringGranule(total_file_pages, areas_ - tight());
  const auto doublings = static_cast<uint64_t>(std::countr_zero(coarsest));
  const uint64_t step = 1 + (areas_in_use - exact) * doublings / (tight() - exact);
  return std::min(coarsest, uint64_t{1} << step);
}

}  // namespace mvgpu::domain
