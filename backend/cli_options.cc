#include "backend/cli_options.h"

namespace mvgpu::backend {

namespace {

void CheckBelongs(const std::string& option, const std::string& value, DmaMode wanted,
                  DmaMode chosen) {
  if (value.empty() || chosen == wanted) return;
  throw CLI::ValidationError(fmt::format("{}={} means nothing with --dma={}, only with --dma={}",
                                         option, value, DmaModeName(chosen), DmaModeName(wanted)));
}

}  // namespace

void AddDmaOptions(CLI::App& app, VgpuConfig& config) {
  AddChoice<DmaMode>(
      app, "--dma", config.dma, DmaModes(),
      "What stands in for dma_map_page: none (host pointers, for CPU rendering; the default), "
      "physical (host physical addresses, needs CAP_SYS_ADMIN), iommu (addresses of an IOMMU), "
      "vulkan (addresses of a Vulkan device)");
  app.add_option("--iommu-group", config.iommu_group,
                 "With --dma=iommu: the IOMMU group, a number in /dev/vfio, whose device does the "
                 "DMA (default: an IOMMU in software)");
  app.add_option("--vulkan-device", config.vulkan_device,
                 "With --dma=vulkan: a UUID, a PCI address, /dev/dri/renderD128 or how a device's "
                 "name begins (default: the first device that can)");
  app.parse_complete_callback([&config] {
    CheckBelongs("--iommu-group", config.iommu_group, DmaMode::kIommu, config.dma);
    CheckBelongs("--vulkan-device", config.vulkan_device, DmaMode::kVulkan, config.dma);
  });
}

}  // namespace mvgpu::backend
