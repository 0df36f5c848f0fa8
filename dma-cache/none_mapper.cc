#include <bit>

#include "dma-cache/mapper.h"

namespace mvgpu::dma {

namespace {

class NoneMapper final : public Mapper {
 public:
  std::string_view name() const override { return "none"; }
  Result<DmaAddr> map(const domain::PinnedRun& run, Direction) override {
    return DmaAddr(std::bit_cast<uint64_t>(run.host));
  }
  void unmap(DmaAddr, uint64_t) override {}
};

}  // namespace

std::unique_ptr<Mapper> MakeNoneMapper() { return std::make_unique<NoneMapper>(); }

}  // namespace mvgpu::dma
