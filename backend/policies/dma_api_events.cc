#include "backend/policies/dma_api_events.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

namespace mvgpu::backend {

namespace {

constexpr std::array<std::string_view, 20> kEvents{
    "dma_map_page", "dma_map_phys", "dma_map_sg", "dma_unmap_page", "dma_unmap_phys",
    "dma_unmap_sg", "dma_sync_single_for_cpu", "dma_sync_single_for_device",
    // Left out, always.
    "dma_map_resource", "dma_unmap_resource", "dma_map_sg_err", "dma_sync_sg_for_cpu",
    "dma_sync_sg_for_device", "dma_alloc", "dma_alloc_pages", "dma_alloc_sgt", "dma_alloc_sgt_err",
    "dma_free", "dma_free_pages", "dma_free_sgt"};

std::string DeviceOf(const KernelEvent& event) {
  return std::string(event.fields.substr(0, event.fields.find(' ')));
}
// nullopt: none that moves data.
std::optional<dma::Direction> DirectionOf(const KernelEvent& event) {
  const auto text = FieldOf(event.fields, "dir");
  if (text == "TO_DEVICE") return dma::Direction::kToDevice;
  if (text == "FROM_DEVICE") return dma::Direction::kFromDevice;
  if (text == "BIDIRECTIONAL") return dma::Direction::kBidirectional;
  return std::nullopt;
}
bool IsOfADevice(const KernelEvent& event) {
  const size_t attributes = event.fields.find(" attrs=");
  return attributes != std::string_view::npos &&
         event.fields.find("MMIO", attributes) != std::string_view::npos;
}
Result<IovaRange> GuestRange(const KernelEvent& event, uint64_t phys, uint64_t size) {
  const auto range = IovaRange::FromStartAndSize(Iova(phys), size);
  if (range) return *range;
  return Fail(
      ErrorCode::kCorrupt,
      fmt::format("a {} event with {} bytes at {:#x}, which is no range", event.name, size, phys));
}

}  // namespace

bool DmaApiEvents::Knows(const KernelEvent& event) {
  return (event.system.empty() || event.system == "dma") &&
         std::find(kEvents.begin(), kEvents.end(), event.name) != kEvents.end();
}

Result<void> DmaApiEvents::take(const KernelEvent& event, uint64_t now_ns) {
  now_ns_ = now_ns;
  const std::string_view name = event.name;
  if (name == "dma_map_page" || name == "dma_map_phys") return TakeMap(event);
  if (name == "dma_map_sg") return TakeMapList(event);
  if (name == "dma_unmap_page" || name == "dma_unmap_phys") return TakeUnmap(event);
  if (name == "dma_unmap_sg") return TakeUnmapList(event);
  if (name.starts_with("dma_sync_single_for_")) return TakeSync(event);
  return Skip(event);
}

Result<void> DmaApiEvents::Skip(const KernelEvent& event) {
  builder_.skip(event.name);
  return {};
}

Result<void> DmaApiEvents::TakeMap(const KernelEvent& event) {
  MVGPU_ASSIGN_OR_RETURN(const uint64_t dma, NumberOf(event, "dma_addr", 16));
  MVGPU_ASSIGN_OR_RETURN(const uint64_t phys, NumberOf(event, "phys_addr", 16));
  MVGPU_ASSIGN_OR_RETURN(const uint64_t size, NumberOf(event, "size"));
  const auto direction = DirectionOf(event);
  if (!direction || IsOfADevice(event)) return Skip(event);
  MVGPU_ASSIGN_OR_RETURN(const IovaRange range, GuestRange(event, phys, size));
  Key key{DeviceOf(event), dma};
  if (const auto told = iommu_.find(dma, range)) {
    builder_.repeat();
    MVGPU_RETURN_IF_ERROR(EndStale(key, &single_));
    const Live live{told->buffer, told->first, PagesOf(range).count, size, true};
    single_.insert_or_assign(std::move(key), live);
    return {};
  }
  return Map(std::move(key), {&range, 1}, *direction, &single_);
}

Result<void> DmaApiEvents::TakeMapList(const KernelEvent& event) {
  MVGPU_ASSIGN_OR_RETURN(const auto phys, ListOf(event, "phys_addrs"));
  MVGPU_ASSIGN_OR_RETURN(const auto sizes, ListOf(event, "sizes"));
  const auto direction = DirectionOf(event);
  // Where an IOMMU of the guest joined pieces there are fewer sizes than addresses.
  const bool is_whole = event.fields.find("[TRUNCATED]") == std::string_view::npos;
  if (!direction || !is_whole || phys.size() != sizes.size() || phys.empty()) return Skip(event);
  std::vector<IovaRange> ranges;
  for (size_t i = 0; i < phys.size(); ++i) {
    MVGPU_ASSIGN_OR_RETURN(const IovaRange range, GuestRange(event, phys[i], sizes[i]));
    ranges.push_back(range);
  }
  Key key{DeviceOf(event), phys.front()};
  const auto dma = ListOf(event, "dma_addrs");
  const bool is_told = dma && dma->size() == ranges.size() && [&] {
    for (size_t i = 0; i < ranges.size(); ++i) {
      if (!iommu_.find((*dma)[i], ranges[i])) return false;
    }
    return true;
  }();
  if (is_told) {
    builder_.repeat();
    MVGPU_RETURN_IF_ERROR(EndStale(key, &lists_));
    lists_.insert_or_assign(std::move(key), Live{.is_told = true});
    return {};
  }
  return Map(std::move(key), ranges, *direction, &lists_);
}

Result<void> DmaApiEvents::Map(Key key, std::span<const IovaRange> ranges, dma::Direction direction,
                               LiveTable* table) {
  MVGPU_RETURN_IF_ERROR(EndStale(key, table));
  auto buffer = builder_.add_buffer(ranges, direction);
  if (!buffer) return Fail(ErrorCode::kCorrupt, buffer.error().message());
  MVGPU_RETURN_IF_ERROR(builder_.map(now_ns_, *buffer));
  const Live live{*buffer, 0, builder_.pages_of(*buffer), ranges.front().size(), false};
  table->insert_or_assign(std::move(key), live);
  return builder_.access_all(now_ns_, *buffer);
}

Result<void> DmaApiEvents::EndStale(const Key& key, LiveTable* table) {
  const auto found = table->find(key);
  if (found == table->end()) return {};
  const Live live = found->second;
  table->erase(found);
  return live.is_told ? Result<void>() : builder_.unmap(now_ns_, live.buffer);
}

Result<void> DmaApiEvents::Unmap(LiveTable::iterator found, LiveTable* table) {
  const Live live = found->second;
  table->erase(found);
  if (!live.is_told) return builder_.unmap(now_ns_, live.buffer);
  builder_.repeat();
  return {};
}

Result<void> DmaApiEvents::UnmapOrSkip(const KernelEvent& event, const Key& key, LiveTable* table) {
  const auto found = table->find(key);
  return found == table->end() ? Skip(event) : Unmap(found, table);
}

Result<void> DmaApiEvents::TakeUnmap(const KernelEvent& event) {
  MVGPU_ASSIGN_OR_RETURN(const uint64_t dma, NumberOf(event, "dma_addr", 16));
  return UnmapOrSkip(event, {DeviceOf(event), dma}, &single_);
}

Result<void> DmaApiEvents::TakeUnmapList(const KernelEvent& event) {
  MVGPU_ASSIGN_OR_RETURN(const auto phys, ListOf(event, "phys_addrs"));
  if (phys.empty()) {
    return Fail(ErrorCode::kCorrupt, fmt::format("a {} event without phys_addrs", event.name));
  }
  return UnmapOrSkip(event, {DeviceOf(event), phys.front()}, &lists_);
}

Result<void> DmaApiEvents::TakeSync(const KernelEvent& event) {
  MVGPU_ASSIGN_OR_RETURN(const uint64_t dma, NumberOf(event, "dma_addr", 16));
  // Maybe a part of it.
  auto found = single_.upper_bound({DeviceOf(event), dma});
  if (found == single_.begin()) return Skip(event);
  --found;
  const Live& live = found->second;
  const bool is_inside =
      found->first.device == DeviceOf(event) && dma - found->first.address < live.bytes;
  // What the IOMMU has unmapped since is not for the device any more.
  if (!is_inside || !builder_.is_mapped(live.buffer)) return Skip(event);
  return builder_.access(now_ns_, live.buffer, live.first, live.pages);
}

}  // namespace mvgpu::backend
