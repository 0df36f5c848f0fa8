#pragma once

// A modern virtio device on PCI (virtio 1.2, 4.1), as a VMM sees it over VFIO: configuration space,
// MSI-X, the structures in BAR 4, and the queues behind them. What the requests mean is the
// VirtioDevice's business.
//
//   driver writes the notify structure -> Owner::on_notify() -> the device's thread calls
//   process_one() until there is nothing: pop a chain, VirtioDevice::handle(), respond, push; and
//   deliver_interrupts() when what was written is in guest memory.
//
// A register access never touches guest memory and never waits: a VMM stops the whole VM until it
// is answered. Guest memory is touched in process_one() only.
//
// VMMs unmap and map RAM again when memory is re-arranged (QEMU: firmware, memory sections that are
// split), and a request may be looked for in between. A queue whose memory is not mapped therefore
// waits, and is looked at again after the next dma_map().
//
// A queue with which the guest broke the rules is stopped: the device status gets
// DEVICE_NEEDS_RESET, the driver a configuration interrupt, the owner the reason. The rest goes on
// working until the driver resets.
//
// Features. VIRTIO_F_ACCESS_PLATFORM is offered: the addresses in the rings are what the VMM
// mapped, so with a vIOMMU they are IOVAs, and only a driver that takes this feature asks the
// guest's IOMMU for them. One that does not take it still works where there is no vIOMMU (and
// addresses are the same), so it is not turned away, as 6.1 would allow. With a vIOMMU its
// addresses are not mapped, and it ends in DEVICE_NEEDS_RESET, not in somebody else's memory.
// VIRTIO_F_RING_RESET is not offered: a GPU driver has no use for a reset of one queue.
//
// Not thread-safe: every call, process_one() included, is made under one lock of the caller.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/base/unique_fd.h"
#include "apionly-domain/container.h"
#include "vmm-glue/pci/config_space.h"
#include "vmm-glue/pci/msix.h"
#include "vmm-glue/vfio_device.h"
#include "vmm-glue/virtio/common_config.h"
#include "vmm-glue/virtio/split_queue.h"
#include "vmm-glue/virtio/virtio_device.h"
#include "vmm-glue/virtio/virtio_pci_layout.h"

namespace mvgpu::glue {

class VirtioPciDevice final : public VfioDevice, private CommonConfig::Owner {
 public:
  class Owner {
   public:
    virtual ~Owner() = default;
    // The driver says that there is something in a queue: have process_one() called, from
    // elsewhere.
    virtual void on_notify(uint16_t queue) = 0;
    // A queue was stopped. A guest can cause this as often as it likes.
    virtual void on_queue_error(uint16_t queue, const Error& error) = 0;
    // A queue waits until the VMM maps memory (again) that its next request needs.
    virtual void on_queue_waiting(uint16_t queue, const Error& error) = 0;
    // The driver, or the VMM, reset the device: what is still to be written for it is void.
    virtual void on_driver_reset() {}
  };
  struct Options {
    uint32_t class_code = 0;  // PCI, 24 bits
  };

  // All outlive the transport; the domain is attached to the container. Errors: kInvalid when the
  // device has no queues, too many of them, or sizes that no ring can have.
  static Result<std::unique_ptr<VirtioPciDevice>> Create(Options options, VirtioDevice* device,
                                                         domain::ApiOnlyDomain* domain,
                                                         domain::Container* container,
                                                         Owner* owner);

  enum class Processed : uint8_t {
    kNothing,  // there was no request, or the queue is not running
    kOne,
    kPending,  // guest memory is not at hand (RemoteMemory): nothing was done, to be called again
  };
  // Handles one request. The driver is not interrupted yet.
  Processed process_one(uint16_t queue);
  // Interrupts the driver for the requests that were handled since the last call.
  void deliver_interrupts();
  // For an owner that brings the answers to the guest later: the queue waits for the next
  // dma_map(), or stands still until a reset, because one could not be written.
  void wait_for_memory(uint16_t queue, const Error& why);
  void stop_queue(uint16_t queue, const Error& why);
  // Whether a running queue was notified since process_one() last found it empty. Reads no guest
  // memory.
  bool has_work() const;

  // The device's configuration changed: the driver will look at it.
  void notify_config_change();

  uint8_t status() const { return common_.status(); }

  RegionInfo region_info(uint32_t region) const override;
  IrqInfo irq_info(uint32_t irq) const override;
  void region_read(uint32_t region, uint64_t offset, std::span<std::byte> data) override;
  void region_write(uint32_t region, uint64_t offset, std::span<const std::byte> data) override;
  void bind_irqs(uint32_t irq, uint32_t start, std::vector<UniqueFd> eventfds) override;
  void disable_irqs(uint32_t irq) override;
  void trigger_irq(uint32_t irq, uint32_t vector) override;
  void set_irq_masked(uint32_t irq, uint32_t vector, bool masked) override;
  void reset() override;
  Result<void> dma_map(domain::Container::MapRequest request) override;
  Result<uint64_t> dma_unmap(Iova start, uint64_t size) override;
  Result<uint64_t> dma_unmap_all() override;

 private:
  // What there is of a queue beyond its settings in the common configuration.
  struct QueueState {
    std::unique_ptr<SplitQueue> rings;  // made when the first request is looked for
    bool notified = false;
    bool stopped = false;
    bool waits_for_memory = false;  // until the next dma_map()
    bool interrupt_due = false;
  };

  VirtioPciDevice(VirtioDevice* device, domain::ApiOnlyDomain* domain, domain::Container* container,
                  Owner* owner, const std::vector<uint16_t>& queue_sizes, uint32_t class_code);

  void on_features_accepted(uint64_t features) override;
  void on_driver_ok() override;
  void on_driver_reset() override;

  bool is_running(uint16_t queue) const;
  Result<bool> TryProcessOne(uint16_t queue);
  Result<void> StartRings(uint16_t queue);
  void RaiseConfigInterrupt();

  // The structures in BAR 4; `offset` counts from the structure's page.
  void ReadStructure(uint32_t page, uint64_t offset, std::span<std::byte> data);
  void WriteStructure(uint32_t page, uint64_t offset, std::span<const std::byte> data);
  void ReadIsr(uint64_t offset, std::span<std::byte> data);
  void ReadDeviceConfig(uint64_t offset, std::span<std::byte> data) const;
  void WriteDeviceConfig(uint64_t offset, std::span<const std::byte> data);
  void WriteNotify(uint64_t offset, size_t size);

  void ReadBar(uint32_t bar, uint64_t offset, std::span<std::byte> data);
  void WriteBar(uint32_t bar, uint64_t offset, std::span<const std::byte> data);
  // The access through configuration space that the driver set up; size 0 when that makes no sense.
  struct Window {
    uint32_t bar = 0;
    uint32_t offset = 0;
    uint32_t size = 0;
  };
  Window window() const;
  bool TouchesWindow(uint64_t offset, size_t size) const;

  VirtioDevice* const device_;  // these four outlive this, see Create()
  domain::ApiOnlyDomain* const domain_;
  domain::Container* const container_;
  Owner* const owner_;

  Msix msix_;
  VirtioPciConfigSpace config_;
  CommonConfig common_;
  UniqueFd error_eventfd_;  // kIrqErr: accepted, and never signalled
  uint8_t isr_ = 0;
  std::vector<QueueState> queues_;
  QueueRequest request_;             // the request under way
  std::vector<std::byte> response_;  // and its response
};

}  // namespace mvgpu::glue
