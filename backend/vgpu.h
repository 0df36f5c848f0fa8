#pragma once

// One vGPU of one VM, put together: the VMM's side (glue::VfioDevice) at the top, guest memory at
// the bottom.
//
//   registers, queues  VirtioGpuPci -> GpuDevice -> DmaCache -> ApiOnlyDomain -> PinBackend,
//   DMA_MAP, UNMAP     Container ---------------------------------^    |         LedgerRow
//                                             memory without a file    StepMemory -> RemoteMemory
//
// Two threads meet here: the one that serves the VMM calls the VfioDevice methods, the device
// thread calls step(). One lock makes each call and each step whole: a DMA_UNMAP never comes in the
// middle of a request, and an observer sees one order of events, which a replay can follow. A step
// is one request, a few milliseconds of copying at most, so that the VMM is answered in time.
//
// A step that needs memory without a file would have to wait for the VMM, which may be waiting for
// the lock. It is undone, the bytes are fetched without the lock, and it is tried again
// (step_memory.h). What it wrote goes out, without the lock, when it is done, and then the guest is
// interrupted. Where a driver resets its device just then, one write may still be under way: no VMM
// serves it before it has the answer to its own message.
//
// With an IOMMU of the guest's before it (guest_iommu.h), the pages in commands are under a PASID;
// rings and requests stay at addresses of guest memory, as for a driver without
// VIRTIO_F_ACCESS_PLATFORM. Its registers are used under the same lock, so an invalidation never
// comes in the middle of a request, and has its effect before its wait descriptor is answered. A
// step that the guest has to find pages for is undone, and tried again after its answer, which is a
// doorbell for the owner.

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "apionly-domain/accounting/ledger.h"
#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/assigned/assigned_iommu.h"
#include "apionly-domain/assigned/assigned_space.h"
#include "apionly-domain/base/mutex.h"
#include "apionly-domain/container.h"
#include "apionly-domain/viommu/device_address_space.h"
#include "backend/guest_iommu.h"
#include "backend/session_observer.h"
#include "backend/step_memory.h"
#include "backend/step_observer.h"
#include "backend/vgpu_config.h"
#include "dma-cache/dma_cache.h"
#include "gpu-model/display/display.h"
#include "gpu-model/display/fan_out.h"
#include "gpu-model/display/screenshot.h"
#include "gpu-model/gpu_device.h"
#include "vmm-glue/vfio_device.h"
#include "vmm-glue/virtio/virtio_gpu_pci.h"

namespace mvgpu::backend {

// Thread-safe, see above. Lock order: this lock, then those of the parts.
class Vgpu final : public glue::VfioDevice, private glue::VirtioPciDevice::Owner {
 public:
  class Owner {
   public:
    virtual ~Owner() = default;
    // Both are called with the lock held and must not call back.
    // The guest rang a doorbell, or has answered for pages that a request waits for: step() has
    // work.
    virtual void on_doorbell(uint16_t queue) = 0;
    // The guest broke the rules of a queue, which stands still until its driver resets the device.
    virtual void on_queue_error(uint16_t queue, const Error& error) = 0;
    // A queue waits until the VMM maps memory (again) that its next request needs.
    virtual void on_queue_waiting(uint16_t queue, const Error& error) = 0;
    // A command was refused because its pages could not be pinned, mapped or read, or memory ran
    // out.
    virtual void on_refused(const Error& error) = 0;
    // The VMM mapped a file that it may truncate. Once for each file.
    virtual void on_unsealed_memory(IovaRange range) = 0;
    // The device works with memory that has no file, which is slow. Once, with the first address.
    virtual void on_remote_memory(Iova first) = 0;
    // The kernel had moved so many pages in spite of their pins; what uses them was told.
    virtual void on_moved_pages(uint64_t pages) = 0;
  };
  // What the configuration leaves to the caller to make or to wrap.
  struct Parts {
    // The device's addresses go through this IOMMU: sets the space and the mapper, and where the
    // IOMMU holds what it maps, the pin back end, for nothing else has to hold it then.
    void go_through(std::unique_ptr<domain::AssignedIommu> device_iommu);

    std::unique_ptr<domain::AssignedSpace> space;  // may be null; used by those below
    std::unique_ptr<domain::Container> container;  // what the mapper may ask about mappings
    std::unique_ptr<domain::PinBackend> pin_backend;
    std::unique_ptr<dma::Mapper> mapper;
    // Asks the VMM for memory without a file, and waits for it. Outlives the vGPU. Null: such
    // memory cannot be reached.
    domain::RemoteMemory* remote = nullptr;
    // The IOMMU that the guest sees before this device. A trace has no records for it: what is
    // recorded then cannot be replayed.
    std::optional<GuestIommu::Options> iommu{};
  };
  struct Counters {
    domain::Container::Totals container;
    domain::ApiOnlyDomain::Counters domain;
    dma::DmaCache::Counters cache;
    gpu::GpuDevice::Counters gpu;
    // Of the cache, after any request, register access or reset.
    uint64_t peak_cached_pages = 0;
    uint64_t peak_idle_pages = 0;
    uint64_t moved_pages = 0;  // found by recheck()

    // Nothing of the guest's is held any more: no mapping, pin, lock, charge, cached page or
    // resource.
    bool all_released() const;
  };

  // Errors: those of MakeIoUringPinBackend(), PhysicalMapper::Create(), Type1Container::Create(),
  // IommufdContainer::Create() and OpenVulkanMapper(); kInvalid for --dma=physical without pins.
  static Result<Parts> MakeParts(const VgpuConfig& config);
  // `observer` may be null; it and `owner` outlive the vGPU. Errors: those of Ledger::Open(),
  // ApiOnlyDomain::Create() and GpuDevice::Create().
  static Result<std::unique_ptr<Vgpu>> Create(VgpuConfig config, Parts parts,
                                              SessionObserver* observer, Owner* owner);
  // REQUIRES: reset() and dma_unmap_all() came last.
  ~Vgpu() override;

  // Takes one request off the queue and answers it; false when there was none. Called by one thread
  // at a time, and by none that Parts::remote waits for. When that says kProtocol, the step ends
  // undone.
  bool step(uint16_t queue);

  // Looks whether cached pages are still where the device was told that they are, and takes away
  // what moved: requests that need it map it anew. Takes time in proportion to what is cached, with
  // the lock held. False when nothing is cached, so that there is nothing to look at before the
  // next step().
  bool recheck();

  // What the guest does to the registers of its IOMMU: called once, with the lock held, at a moment
  // when no request is under way. Must not call back. REQUIRES: Parts::iommu was given.
  void use_iommu(const std::function<void(GuestIommu&)>& access);

  // What the addresses in commands are now: of guest memory, or of an IOMMU that the guest sees.
  domain::DeviceAddressSpace::Kind addresses() const;
  Counters counters() const;
  // What a replay of the same session must reproduce: a JSON object of counters and the hash of the
  // last picture.
  std::string session_json() const;
  // What the mapper did and holds: not the same with every mapper, so no part of the above.
  dma::Mapper::Figures mapper_figures() const { return cache_->mapper_figures(); }
  const gpu::Screenshot& picture() const { return screenshot_; }
  const VgpuConfig& config() const { return config_; }

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
  Vgpu(VgpuConfig config, Parts parts, SessionObserver* observer, Owner* owner);
  Result<void> Assemble();
  Result<std::unique_ptr<gpu::GpuDevice>> MakeGpu(gpu::GpuDevice::Owner* gpu_owner);

  // A step() under way.
  struct Step {
    uint16_t queue;
    bool is_done = false;  // but its answer may not be in guest memory yet
    bool did = false;      // there was a request
    StepMemory::Exchange exchange{};
  };
  // Takes a step as far as it gets without the VMM. False: step.exchange is to be run.
  bool Advance(Step& step);
  // False: memory is missing.
  bool Try(Step& step) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Whether the next write may go out. If not, the queue it belongs to is stopped, or it and
  // `queue` wait.
  bool MayWrite(uint16_t queue) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // After whatever may have changed what is cached: for the reader of the accounts.
  void ShowCache() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // After whatever a replay does, too, and may have cached something or left it idle.
  void NotePeaks() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // For the observer, after whatever may have changed the accounts: tells it when they did.
  void TellAccounts() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // The same after a step, which mostly pins nothing.
  void TellAccountsOfStep() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Take(Step& step) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  void on_driver_reset() override ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void on_notify(uint16_t queue) override { owner_->on_doorbell(queue); }
  void on_queue_error(uint16_t queue, const Error& error) override {
    owner_->on_queue_error(queue, error);
  }
  void on_queue_waiting(uint16_t queue, const Error& error) override {
    owner_->on_queue_waiting(queue, error);
  }

  // Tells the observer of every picture, by its hash.
  class FrameReporter final : public gpu::Display {
   public:
    explicit FrameReporter(SessionObserver* observer) : observer_(observer) {}
    void on_frame(uint32_t scanout, const gpu::FrameView& frame, const gpu::Rect& damage) override;
    void on_disabled(uint32_t) override {}

   private:
    SessionObserver* const observer_;  // outlives the vGPU
  };

  // Stands between the GPU and the transport, which has no use for reasons.
  class GpuOwner final : public gpu::GpuDevice::Owner {
   public:
    GpuOwner(gpu::GpuDevice::Owner* transport, Vgpu::Owner* owner)
        : transport_(transport), owner_(owner) {}
    void on_display_event() override { transport_->on_display_event(); }
    void on_refused(const Error& why) override { owner_->on_refused(why); }

   private:
    gpu::GpuDevice::Owner* const transport_;  // owns the GPU
    Vgpu::Owner* const owner_;                // outlives the vGPU
  };

  const VgpuConfig config_;
  Owner* const owner_;                      // outlives this, see Create()
  domain::RemoteMemory* const remote_;      // likewise; may be null
  std::unique_ptr<StepObserver> observer_;  // null when nobody observes

  mutable Mutex mutex_;
  StepMemory step_memory_ ABSL_GUARDED_BY(mutex_);
  uint16_t tried_queue_ ABSL_GUARDED_BY(mutex_) = 0;  // the last one; writes that wait are its
  bool has_used_remote_ ABSL_GUARDED_BY(mutex_) = false;
  AccountFigures told_accounts_ ABSL_GUARDED_BY(mutex_);
  uint64_t told_cache_changes_ ABSL_GUARDED_BY(mutex_) = 0;  // misses and unmapped pages until then
  uint64_t peak_cached_pages_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t peak_idle_pages_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t moved_pages_ ABSL_GUARDED_BY(mutex_) = 0;
  // In the order of their making: each uses those above it. Set once by Assemble().
  std::unique_ptr<domain::Ledger> ledger_;
  const std::unique_ptr<domain::AssignedSpace> space_;  // may be null
  const std::unique_ptr<domain::Container> container_;
  std::unique_ptr<domain::PinBackend> pin_backend_;  // until the domain takes it
  std::unique_ptr<domain::ApiOnlyDomain> domain_;
  std::unique_ptr<dma::Mapper> mapper_;
  std::unique_ptr<dma::DmaCache> cache_;
  const std::optional<GuestIommu::Options> iommu_options_;
  std::unique_ptr<GuestIommu> iommu_ ABSL_PT_GUARDED_BY(mutex_);  // null: the guest sees none
  domain::DeviceAddressSpace addresses_;  // of the device; what stands behind it is guarded too
  gpu::Screenshot screenshot_;
  FrameReporter frame_reporter_;
  gpu::FanOut displays_;
  std::unique_ptr<GpuOwner> gpu_owner_;
  std::unique_ptr<glue::VirtioGpuPci> device_ ABSL_PT_GUARDED_BY(mutex_);
};

}  // namespace mvgpu::backend
