#pragma once

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "apionly-domain/base/error.h"
#include "apionly-domain/base/unique_fd.h"
#include "apionly-domain/container.h"
#include "vmm-glue/vfio_device.h"

namespace mvgpu::testing {

// A device whose regions are plain memory and whose interrupts add one to the eventfd bound to
// them. It keeps its mappings in a real container and writes down what was done to it, in order.
//
// Regions: BAR 0 and the config space read-write, BAR 2 read-only, BAR 4 write-only, the others
// absent. Interrupts: 2048 MSI-X vectors, one ERR, one REQ, no INTx, no MSI.
class FakeVfioDevice final : public glue::VfioDevice {
 public:
  static constexpr uint64_t kBar0Size = 2 << 20;  // larger than one transfer
  static constexpr uint64_t kBar2Size = 0x1000;
  static constexpr uint64_t kBar4Size = 0x100;
  static constexpr uint64_t kConfigSize = 0x1000;
  static constexpr uint32_t kMsixVectors = 2048;

  FakeVfioDevice() {
    for (uint32_t region = 0; region < glue::kRegionCount; ++region) {
      memory_[region].resize(region_info(region).size);
    }
  }

  // What has been done, e.g. "reset" or "write region=0 offset=0x10 count=4".
  std::vector<std::string> calls;
  std::set<std::pair<uint32_t, uint32_t>> masked;  // (irq, vector)
  std::map<std::pair<uint32_t, uint32_t>, UniqueFd> eventfds;
  std::optional<ErrorCode> next_unmap_error;
  domain::Container container;

  long count(const std::string& call) const { return std::count(calls.begin(), calls.end(), call); }
  std::span<std::byte> memory(uint32_t region) { return memory_[region]; }
  // What the device does to interrupt its driver.
  void fire(uint32_t irq, uint32_t vector) { trigger_irq(irq, vector); }

  RegionInfo region_info(uint32_t region) const override {
    switch (region) {
      case 0:
        return {.size = kBar0Size, .readable = true, .writable = true};
      case 2:
        return {.size = kBar2Size, .readable = true, .writable = false};
      case 4:
        return {.size = kBar4Size, .readable = false, .writable = true};
      case glue::kRegionConfig:
        return {.size = kConfigSize, .readable = true, .writable = true};
      default:
        return {.size = 0, .readable = true, .writable = true};
    }
  }
  IrqInfo irq_info(uint32_t irq) const override {
    switch (irq) {
      case glue::kIrqMsix:
        return {.count = kMsixVectors, .eventfd = true};
      case glue::kIrqErr:
        return {.count = 1, .eventfd = true};
      case glue::kIrqReq:
        return {.count = 1, .eventfd = true};
      case glue::kIrqIntx:
        return {.count = 0, .eventfd = true, .maskable = true, .automasked = true};
      default:
        return {};
    }
  }

  // The spans must lie inside the region: the server's promise.
  void region_read(uint32_t region, uint64_t offset, std::span<std::byte> data) override {
    calls.push_back(
        fmt::format("read region={} offset={:#x} count={}", region, offset, data.size()));
    MVGPU_CHECK(region_info(region).readable);
    std::ranges::copy(At(region, offset, data.size()), data.begin());
  }
  void region_write(uint32_t region, uint64_t offset, std::span<const std::byte> data) override {
    calls.push_back(
        fmt::format("write region={} offset={:#x} count={}", region, offset, data.size()));
    MVGPU_CHECK(region_info(region).writable);
    std::ranges::copy(data, At(region, offset, data.size()).begin());
  }

  void bind_irqs(uint32_t irq, uint32_t start, std::vector<UniqueFd> fds) override {
    calls.push_back(fmt::format("bind irq={} start={} count={}", irq, start, fds.size()));
    MVGPU_CHECK(uint64_t{start} + fds.size() <= irq_info(irq).count);
    for (UniqueFd& fd : fds) eventfds[{irq, start++}] = std::move(fd);
    std::erase_if(eventfds, [](const auto& entry) { return !entry.second.is_valid(); });
  }
  void disable_irqs(uint32_t irq) override {
    calls.push_back(fmt::format("disable irq={}", irq));
    std::erase_if(eventfds, [irq](const auto& entry) { return entry.first.first == irq; });
  }
  void trigger_irq(uint32_t irq, uint32_t vector) override {
    calls.push_back(fmt::format("trigger irq={} vector={}", irq, vector));
    MVGPU_CHECK(vector < irq_info(irq).count);
    const auto bound = eventfds.find({irq, vector});
    if (bound == eventfds.end()) return;
    const uint64_t one = 1;
    // Nobody may be listening: what a test bound need not be an eventfd.
    [[maybe_unused]] const ssize_t written = write(bound->second.get(), &one, sizeof(one));
  }
  void set_irq_masked(uint32_t irq, uint32_t vector, bool is_masked) override {
    calls.push_back(fmt::format("{} irq={} vector={}", is_masked ? "mask" : "unmask", irq, vector));
    MVGPU_CHECK(vector < irq_info(irq).count);
    if (is_masked) {
      masked.insert({irq, vector});
    } else {
      masked.erase({irq, vector});
    }
  }

  void reset() override { calls.push_back("reset"); }

  Result<void> dma_map(domain::Container::MapRequest request) override {
    calls.push_back(fmt::format("map iova={:#x} size={:#x} access={} file={} offset={:#x}",
                                request.iova.value(), request.size,
                                static_cast<int>(request.access), request.fd.is_valid(),
                                request.file_offset));
    return container.map(std::move(request));
  }
  Result<uint64_t> dma_unmap(Iova start, uint64_t size) override {
    calls.push_back(fmt::format("unmap iova={:#x} size={:#x}", start.value(), size));
    if (const auto error = std::exchange(next_unmap_error, std::nullopt)) {
      return Fail(*error, "unmap refused by the test");
    }
    return container.unmap(start, size);
  }
  Result<uint64_t> dma_unmap_all() override {
    calls.push_back("unmap all");
    return container.unmap_all();
  }

 private:
  std::span<std::byte> At(uint32_t region, uint64_t offset, uint64_t size) {
    auto& bytes = memory_[region];
    MVGPU_CHECK(offset <= bytes.size() && size <= bytes.size() - offset);
    return std::span(bytes).subspan(offset, size);
  }

  std::array<std::vector<std::byte>, glue::kRegionCount> memory_;
};

}  // namespace mvgpu::testing
