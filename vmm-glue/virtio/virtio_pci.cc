#include "vmm-glue/virtio/virtio_pci.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "apionly-domain/base/check.h"

namespace mvgpu::glue {

namespace {

// 4.1.4.5
constexpr uint8_t kIsrQueue = 1;
constexpr uint8_t kIsrConfig = 2;

constexpr uint64_t kTransportFeatures =
    kFeatureVersion1 | kFeatureAccessPlatform | kFeatureIndirectDesc | kFeatureEventIdx;

Result<std::vector<uint16_t>> QueueSizesOf(const VirtioDevice& device) {
  const uint16_t count = device.queue_count();
  if (count == 0 || count > kMaxQueues) {
    return Fail(
        ErrorCode::kInvalid,
        fmt::format("a virtio device with {} queues; 1 to {} are possible", count, kMaxQueues));
  }
  std::vector<uint16_t> sizes;
  for (uint16_t i = 0; i < count; ++i) {
    const uint16_t size = device.queue_size(i);
    if (!std::has_single_bit(size) || size > ring::kMaxQueueSize) {
      return Fail(ErrorCode::kInvalid,
                  fmt::format("queue {} has size {}, which is no power of two up to {}", i, size,
                              ring::kMaxQueueSize));
    }
    sizes.push_back(size);
  }
  if (device.config_size() > kStructurePageSize) {
    return Fail(ErrorCode::kInvalid, fmt::format("device configuration of {} bytes; at most {} fit",
                                                 device.config_size(), kStructurePageSize));
  }
  return sizes;
}

// Calls access(page, offset in the page, part of data) for each structure that an access touches.
template <typename Byte, typename Access>
void ForEachPage(uint64_t offset, std::span<Byte> data, Access access) {
  while (!data.empty() && offset < kVirtioBarSize) {
    const uint64_t in_page = offset % kStructurePageSize;
    const size_t count = std::min<uint64_t>(data.size(), kStructurePageSize - in_page);
    access(static_cast<uint32_t>(offset / kStructurePageSize), in_page, data.first(count));
    data = data.subspan(count);
    offset += count;
  }
}

}  // namespace

Result<std::unique_ptr<VirtioPciDevice>> VirtioPciDevice::Create(Options options,
                                                                 VirtioDevice* device,
                                                                 domain::ApiOnlyDomain* domain,
                                                                 domain::Container* container,
                                                                 Owner* owner) {
  MVGPU_ASSIGN_OR_RETURN(const std::vector<uint16_t> sizes, QueueSizesOf(*device));
  return std::unique_ptr<VirtioPciDevice>(
      new VirtioPciDevice(device, domain, container, owner, sizes, options.class_code));
}

// A vector for each queue and one for the configuration: Linux then shares none.
VirtioPciDevice::VirtioPciDevice(VirtioDevice* device, domain::ApiOnlyDomain* domain,
                                 domain::Container* container, Owner* owner,
                                 const std::vector<uint16_t>& queue_sizes, uint32_t class_code)
    : device_(device),
      domain_(domain),
      container_(container),
      owner_(owner),
      msix_(static_cast<uint16_t>(queue_sizes.size() + 1)),
      config_(MakeVirtioPciConfigSpace(device->device_id(), class_code,
                                       static_cast<uint16_t>(queue_sizes.size()),
                                       device->config_size(), msix_)),
      common_(device->features() | kTransportFeatures, queue_sizes, msix_.vector_count(), this),
      queues_(queue_sizes.size()) {}

// ---- The driver's life --------------------------------------------------------------------------

void VirtioPciDevice::on_features_accepted(uint64_t features) {
  device_->set_driver_features(features & ~kTransportFeatures);
}

void VirtioPciDevice::on_driver_ok() {
  // A driver may have notified too early.
  for (uint16_t i = 0; i < queues_.size(); ++i) {
    if (queues_[i].notified && is_running(i)) owner_->on_notify(i);
  }
}

void VirtioPciDevice::on_driver_reset() {
  for (QueueState& queue : queues_) queue = QueueState{};
  isr_ = 0;
  msix_.clear_pending();
  device_->reset();
  owner_->on_driver_reset();
}

void VirtioPciDevice::reset() {
  config_.space.reset();
  msix_.reset_table();
  common_.reset();
  on_driver_reset();
}

void VirtioPciDevice::notify_config_change() {
  common_.bump_generation();
  RaiseConfigInterrupt();
}

void VirtioPciDevice::RaiseConfigInterrupt() {
  if ((common_.status() & kStatusDriverOk) == 0) return;
  isr_ |= kIsrConfig;
  msix_.notify(common_.config_vector());
}

// ---- Queues -------------------------------------------------------------------------------------

bool VirtioPciDevice::is_running(uint16_t queue) const {
  return queue < queues_.size() && common_.queues()[queue].enabled && !queues_[queue].stopped &&
         (common_.status() & kStatusDriverOk) != 0;
}

bool VirtioPciDevice::has_work() const {
  for (uint16_t i = 0; i < queues_.size(); ++i) {
    if (queues_[i].notified && !queues_[i].waits_for_memory && is_running(i)) return true;
  }
  return false;
}

VirtioPciDevice::Processed VirtioPciDevice::process_one(uint16_t queue) {
  if (!is_running(queue)) return Processed::kNothing;
  const auto processed = TryProcessOne(queue);
  if (!processed) {
    const ErrorCode code = processed.error().code();
    if (code == ErrorCode::kPending) return Processed::kPending;
    const bool may_come_back = code == ErrorCode::kNotMapped || code == ErrorCode::kBusy;
    may_come_back ? wait_for_memory(queue, processed.error())
                  : stop_queue(queue, processed.error());
    return Processed::kNothing;
  }
  if (!*processed) queues_[queue].notified = false;
  return *processed ? Processed::kOne : Processed::kNothing;
}

Result<bool> VirtioPciDevice::TryProcessOne(uint16_t queue) {
  if (queues_[queue].rings == nullptr) MVGPU_RETURN_IF_ERROR(StartRings(queue));
  SplitQueue& rings = *queues_[queue].rings;
  MVGPU_ASSIGN_OR_RETURN(const bool popped, rings.pop(&request_));
  if (!popped) return false;

  if (response_.size() < request_.writable_size()) response_.resize(request_.writable_size());
  const std::span<std::byte> response = std::span(response_).first(request_.writable_size());
  const auto written = device_->handle(queue, request_.readable(), response);
  if (!written) {
    rings.unpop();
    return tl::unexpected<Error>(written.error());
  }
  MVGPU_CHECK(*written <= response.size());

  MVGPU_RETURN_IF_ERROR(rings.respond(request_, response.first(*written)));
  MVGPU_ASSIGN_OR_RETURN(const bool interrupt, rings.push(request_, *written));
  if (interrupt) {
    isr_ |=
        kIsrQueue;  // also with MSI-X: 4.1.4.5 lets a driver look, and QEMU's device says it, too
    queues_[queue].interrupt_due = true;
  }
  return true;
}

void VirtioPciDevice::deliver_interrupts() {
  for (uint16_t i = 0; i < queues_.size(); ++i) {
    if (std::exchange(queues_[i].interrupt_due, false)) msix_.notify(common_.queues()[i].vector);
  }
}

Result<void> VirtioPciDevice::StartRings(uint16_t queue) {
  const CommonConfig::Queue& settings = common_.queues()[queue];
  const uint64_t features = common_.driver_features();
  MVGPU_ASSIGN_OR_RETURN(
      queues_[queue].rings,
      SplitQueue::Create(domain_, {.size = settings.size,
                                   .descriptors = settings.descriptors,
                                   .available = settings.available,
                                   .used = settings.used,
                                   .indirect = (features & kFeatureIndirectDesc) != 0,
                                   .event_idx = (features & kFeatureEventIdx) != 0}));
  return {};
}

void VirtioPciDevice::wait_for_memory(uint16_t queue, const Error& error) {
  if (!queues_[queue].waits_for_memory) owner_->on_queue_waiting(queue, error);
  queues_[queue].waits_for_memory = true;
  queues_[queue].notified = true;
}

void VirtioPciDevice::stop_queue(uint16_t queue, const Error& error) {
  queues_[queue].stopped = true;
  common_.set_needs_reset();
  RaiseConfigInterrupt();  // 2.1.2
  owner_->on_queue_error(queue, error);
}

// ---- BAR 4 --------------------------------------------------------------------------------------

void VirtioPciDevice::ReadStructure(uint32_t page, uint64_t offset, std::span<std::byte> data) {
  switch (page) {
    case kCommonPage:
      return common_.read(offset, data);
    case kIsrPage:
      return ReadIsr(offset, data);
    case kDevicePage:
      return ReadDeviceConfig(offset, data);
    default:
      std::fill(data.begin(), data.end(), std::byte{0});  // notify is for writing
  }
}

void VirtioPciDevice::WriteStructure(uint32_t page, uint64_t offset,
                                     std::span<const std::byte> data) {
  switch (page) {
    case kCommonPage:
      return common_.write(offset, data);
    case kDevicePage:
      return WriteDeviceConfig(offset, data);
    case kNotifyPage:
      return WriteNotify(offset, data.size());
    default:
      return;  // ISR is for reading
  }
}

void VirtioPciDevice::ReadIsr(uint64_t offset, std::span<std::byte> data) {
  std::fill(data.begin(), data.end(), std::byte{0});
  if (offset == 0) data[0] = std::byte{std::exchange(isr_, uint8_t{0})};  // 4.1.4.5: reading clears
}

void VirtioPciDevice::ReadDeviceConfig(uint64_t offset, std::span<std::byte> data) const {
  std::fill(data.begin(), data.end(), std::byte{0});
  const uint32_t size = device_->config_size();
  if (offset >= size) return;
  const size_t count = std::min<uint64_t>(data.size(), size - offset);
  device_->read_config(static_cast<uint32_t>(offset), data.first(count));
}

void VirtioPciDevice::WriteDeviceConfig(uint64_t offset, std::span<const std::byte> data) {
  const uint32_t size = device_->config_size();
  if (offset >= size) return;
  const size_t count = std::min<uint64_t>(data.size(), size - offset);
  device_->write_config(static_cast<uint32_t>(offset), data.first(count));
}

// The place says which queue; the value repeats it and is not looked at (4.1.5.2).
void VirtioPciDevice::WriteNotify(uint64_t offset, size_t size) {
  const uint64_t last = (offset + size - 1) / kNotifyMultiplier;
  for (uint64_t i = offset / kNotifyMultiplier; i <= last && i < queues_.size(); ++i) {
    const auto queue = static_cast<uint16_t>(i);
    queues_[queue].notified = true;
    if (is_running(queue)) owner_->on_notify(queue);
  }
}

void VirtioPciDevice::ReadBar(uint32_t bar, uint64_t offset, std::span<std::byte> data) {
  std::fill(data.begin(), data.end(), std::byte{0});
  if (bar == kMsixBar) return msix_.read(offset, data);
  if (bar != kVirtioBar) return;
  ForEachPage(offset, data, [this](uint32_t page, uint64_t in_page, std::span<std::byte> part) {
    ReadStructure(page, in_page, part);
  });
}

void VirtioPciDevice::WriteBar(uint32_t bar, uint64_t offset, std::span<const std::byte> data) {
  if (bar == kMsixBar) return msix_.write(offset, data);
  if (bar != kVirtioBar) return;
  ForEachPage(offset, data,
              [this](uint32_t page, uint64_t in_page, std::span<const std::byte> part) {
                WriteStructure(page, in_page, part);
              });
}

// ---- Configuration space ------------------------------------------------------------------------

VirtioPciDevice::Window VirtioPciDevice::window() const {
  uint8_t bar = 0;
  uint32_t where[2] = {};  // offset and length
  config_.space.read(config_.window + kWindowBar, std::as_writable_bytes(std::span(&bar, 1)));
  config_.space.read(config_.window + kWindowOffset, std::as_writable_bytes(std::span(where)));
  const uint32_t size = where[1] == 1 || where[1] == 2 || where[1] == 4 ? where[1] : 0;
  return {bar, where[0], size};
}

bool VirtioPciDevice::TouchesWindow(uint64_t offset, size_t size) const {
  const uint64_t data = config_.window + kWindowData;
  return offset < data + kWindowDataSize && data < offset + size;
}

// ---- VFIO ---------------------------------------------------------------------------------------

VfioDevice::RegionInfo VirtioPciDevice::region_info(uint32_t region) const {
  switch (region) {
    case kRegionBar0 + kMsixBar:
      return {Msix::kBarSize, true, true};
    case kRegionBar0 + kVirtioBar:
      return {kVirtioBarSize, true, true};
    case kRegionConfig:
      return {ConfigSpace::kSize, true, true};
    default:
      return {};
  }
}

// The error interrupt exists because QEMU warns at every start when it does not.
VfioDevice::IrqInfo VirtioPciDevice::irq_info(uint32_t irq) const {
  switch (irq) {
    case kIrqMsix:
      return {.count = msix_.vector_count(), .eventfd = true};
    case kIrqErr:
      return {.count = 1, .eventfd = true};
    default:
      return {};
  }
}

void VirtioPciDevice::region_read(uint32_t region, uint64_t offset, std::span<std::byte> data) {
  if (region != kRegionConfig) return ReadBar(region, offset, data);
  if (const Window w = window(); w.size != 0 && TouchesWindow(offset, data.size())) {
    std::byte value[kWindowDataSize] = {};
    ReadBar(w.bar, w.offset, std::span(value).first(w.size));
    config_.space.set(config_.window + kWindowData, value);
  }
  config_.space.read(static_cast<uint32_t>(std::min<uint64_t>(offset, ConfigSpace::kSize)), data);
}

void VirtioPciDevice::region_write(uint32_t region, uint64_t offset,
                                   std::span<const std::byte> data) {
  if (region != kRegionConfig) return WriteBar(region, offset, data);
  config_.space.write(static_cast<uint32_t>(std::min<uint64_t>(offset, ConfigSpace::kSize)), data);
  if (const Window w = window(); w.size != 0 && TouchesWindow(offset, data.size())) {
    std::byte value[kWindowDataSize];
    config_.space.read(config_.window + kWindowData, value);
    WriteBar(w.bar, w.offset, std::span(value).first(w.size));
  }
}

void VirtioPciDevice::bind_irqs(uint32_t irq, uint32_t start, std::vector<UniqueFd> eventfds) {
  if (irq == kIrqErr && start == 0 && eventfds.size() == 1) error_eventfd_ = std::move(eventfds[0]);
  if (irq != kIrqMsix) return;
  for (uint64_t i = 0; i < eventfds.size() && start + i < msix_.vector_count(); ++i) {
    msix_.bind(static_cast<uint16_t>(start + i), std::move(eventfds[i]));
  }
}

void VirtioPciDevice::disable_irqs(uint32_t irq) {
  if (irq == kIrqMsix) msix_.disable();
  if (irq == kIrqErr) error_eventfd_.reset();
}

// The error interrupt stops a VM that runs under QEMU, so it is no subject for a loopback test.
void VirtioPciDevice::trigger_irq(uint32_t irq, uint32_t vector) {
  if (irq == kIrqMsix && vector < msix_.vector_count()) msix_.notify(static_cast<uint16_t>(vector));
}

void VirtioPciDevice::set_irq_masked(uint32_t irq, uint32_t vector, bool masked) {
  if (irq == kIrqMsix && vector < msix_.vector_count()) {
    msix_.set_masked(static_cast<uint16_t>(vector), masked);
  }
}

Result<void> VirtioPciDevice::dma_map(domain::Container::MapRequest request) {
  MVGPU_RETURN_IF_ERROR(container_->map(std::move(request)));
  for (uint16_t i = 0; i < queues_.size(); ++i) {
    if (std::exchange(queues_[i].waits_for_memory, false)) owner_->on_notify(i);
  }
  return {};
}

Result<uint64_t> VirtioPciDevice::dma_unmap(Iova start, uint64_t size) {
  return container_->unmap(start, size);
}

Result<uint64_t> VirtioPciDevice::dma_unmap_all() { return container_->unmap_all(); }

}  // namespace mvgpu::glue
