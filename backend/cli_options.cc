#include "backend/cli_options.h"

namespace mvgpu::backend {

namespace {

void CheckBelongs(const std::string& option, const std::string& value, DmaMode wanted,
                  DmaMode chosen) {
  if (value.empty() || chosen == wanted) return;
  throw CLI::ValidationError(fmt::format("{}={} means nothing with --dma={}, only with --dma={}",
                                         option, value, DmaModeName(chosen), DmaModeName(wanted)));
}

// A real IOMMU's mappings hold the pages.
void CheckPinMeansSomething(const CLI::App& app, const std::string& option,
                            const std::string& value) {
  const CLI::Option* pin = app.get_option_no_throw("--pin");
  if (value.empty() || pin == nullptr || pin->count() == 0) return;
  throw CLI::ValidationError(
      fmt::format("--pin means nothing with {}={}, whose mappings hold the pages; leave it out",
                  option, value));
}

}  // namespace

void AddDmaOptions(CLI::App& app, VgpuConfig& config) {
  AddChoice<DmaMode>(
      app, "--dma", config.dma, DmaModes(),
      "What stands in for dma_map_page: none (host pointers, for CPU rendering; the default), "
      "physical (host physical addresses, needs CAP_SYS_ADMIN), iommu (addresses of an IOMMU), "
      "vulkan (addresses of a Vulkan device)");
  auto* group =
      app.add_option("--iommu-group", config.iommu_group,
                     "With --dma=iommu: the IOMMU group, a number in /dev/vfio, whose device does "
                     "the DMA, through VFIO type1; its mappings hold the pages, instead of --pin "
                     "(default: an IOMMU in software)");
  app.add_option("--vfio-device", config.vfio_device,
                 "The same through iommufd: the PCI address of the device, as in "
                 "/sys/bus/pci/devices, bound to vfio-pci")
      ->excludes(group);
  app.add_option("--vulkan-device", config.vulkan_device,
                 "With --dma=vulkan: a UUID, a PCI address, /dev/dri/renderD128 or how a device's "
                 "name begins (default: the first device that can)");
  app.parse_complete_callback([&app, &config] {
    CheckBelongs("--iommu-group", config.iommu_group, DmaMode::kIommu, config.dma);
    CheckBelongs("--vfio-device", config.vfio_device, DmaMode::kIommu, config.dma);
    CheckPinMeansSomething(app, "--iommu-group", config.iommu_group);
    CheckPinMeansSomething(app, "--vfio-device", config.vfio_device);
    CheckBelongs("--vulkan-device", config.vulkan_device, DmaMode::kVulkan, config.dma);
  });
}

void AddIdleOption(CLI::App& app, std::optional<uint64_t>& bytes, std::string_view without) {
  AddSize(app, "--dma-idle", bytes,
          fmt::format("Memory that may stay pinned and mapped although nobody uses it, in whole "
                      "pages, e.g. 16M; it goes first under --pin-limit; 0: none (default: {})",
                      without))
      ->check([](const std::string& number) {
        if (number == "0" || number.size() > 4 || std::stoull(number) >= kPageSize) {
          return std::string();
        }
        return fmt::format("{} bytes are less than a page; give 4K or more, or 0 for none", number);
      });
}

}  // namespace mvgpu::backend
