#include "dma-cache/mapper.h"

#include <iterator>

namespace mvgpu::dma {

Result<void> Mapper::map_apart(std::span<const domain::PinnedRun> runs, domain::Access access,
                               std::vector<MappedRun>* mapped) {
  const size_t before = mapped->size();
  for (const domain::PinnedRun& run : runs) {
    auto outcome = map({&run, 1}, access, mapped);
    if (outcome) continue;
    for (const MappedRun& done : std::span(*mapped).subspan(before)) {
      unmap(done.address, done.iova.size());
    }
    if (mapped->size() > before) flush();
    mapped->erase(std::next(mapped->begin(), static_cast<ptrdiff_t>(before)), mapped->end());
    return outcome;
  }
  return {};
}

}  // namespace mvgpu::dma
