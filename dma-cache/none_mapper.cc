#include <bit>

#include "dma-cache/mapper.h"

namespace mvgpu::dma {

namespace {

class NoneMapper final : public Mapper {
 public:
  std::string_view name() const override { return "none"; }
  Result<void> map(std::span<const domain::PinnedRun> runs, domain::Access,
                   std::vector<MappedRun>* mapped) override {
    for (const domain::PinnedRun& run : runs)
      mapped->push_back({run.iova, DmaAddr(std::bit_cast<uint64_t>(run.host))});
    return {};
  }
  Result<void> map_apart(std::span<const domain::PinnedRun> runs, domain::Access access,
                         std::vector<MappedRun>* mapped) override {
    return map(runs, access, mapped);
  }
  void unmap(DmaAddr, uint64_t) override {}
};

}  // namespace

std::unique_ptr<Mapper> MakeNoneMapper() { return std::make_unique<NoneMapper>(); }

}  // namespace mvgpu::dma
