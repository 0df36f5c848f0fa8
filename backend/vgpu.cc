#include "backend/vgpu.h"

#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <utility>

#include <nlohmann/json.hpp>

#include "apionly-domain/assigned/iommufd_container.h"
#include "apionly-domain/assigned/mapping_pin_backend.h"
#include "apionly-domain/assigned/software_iommu.h"
#include "apionly-domain/assigned/type1_container.h"
#include "backend/observed_gpu.h"
#include "dma-cache/iommu_mapper.h"
#include "dma-cache/physical_mapper.h"
#include "dma-cache/vulkan/open_vulkan_mapper.h"
#include "gpu-model/display/frame_hash.h"

namespace mvgpu::backend {

namespace {

using nlohmann::json;

std::vector<gpu::Display*> DisplaysFor(gpu::Display* screenshot, gpu::Display* reporter,
                                       const SessionObserver* observer) {
  // Hashing a picture costs as much as copying it: only when somebody wants to know.
  if (observer == nullptr) return {screenshot};
  return {screenshot, reporter};
}

Result<std::unique_ptr<domain::AssignedIommu>> OpenIommu(const VgpuConfig& config) {
  if (!config.vfio_device.empty()) return domain::IommufdContainer::Create(config.vfio_device);
  if (!config.iommu_group.empty()) return domain::Type1Container::Create(config.iommu_group);
  return std::make_unique<domain::SoftwareIommu>();
}

// Sets the mapper, and what comes with it.
Result<void> AddMapper(const VgpuConfig& config, Vgpu::Parts* parts) {
  switch (config.dma) {
    case DmaMode::kNone:
      parts->mapper = dma::MakeNoneMapper();
      break;
    case DmaMode::kPhysical: {
      if (config.pin == PinMode::kNone) {
        return Fail(ErrorCode::kInvalid,
                    "--dma=physical gives out addresses of pages, which must stay where they are: "
                    "use --pin=io-uring or --pin=mlock instead of --pin=none");
      }
      MVGPU_ASSIGN_OR_RETURN(parts->mapper, dma::PhysicalMapper::Create());
      break;
    }
    case DmaMode::kIommu: {
      MVGPU_ASSIGN_OR_RETURN(auto iommu, OpenIommu(config));
      parts->go_through(std::move(iommu));
      break;
    }
    case DmaMode::kVulkan: {
      dma::VulkanMapperOptions options;
      options.device = config.vulkan_device;
      options.mapping_at = [container = parts->container.get()](Iova iova) {
        return container->mapping_at(iova);
      };
      MVGPU_ASSIGN_OR_RETURN(parts->mapper, dma::OpenVulkanMapper(options));
      break;
    }
  }
  return {};
}

SessionObserver::Backing BackingOf(const domain::Container::MapRequest& request) {
  if (!request.fd.is_valid()) return {};
  struct stat status = {};
  const auto identity = domain::GuestFile::IdentityOf(request.fd.get());
  if (!identity || fstat(request.fd.get(), &status) != 0) return {};
  return {*identity, request.file_offset, static_cast<uint64_t>(status.st_size), true};
}

}  // namespace

bool Vgpu::Counters::all_released() const {
  return container.mappings == 0 && domain.mapped_pages == 0 && domain.pinned_pages == 0 &&
         domain.unique_pages == 0 && domain.charged_pages == 0 && domain.locked_pages == 0 &&
         cache.cached_pages == 0 && gpu.resources == 0 && gpu.attached_entries == 0 &&
         gpu.host_bytes == 0;
}

void Vgpu::FrameReporter::on_frame(uint32_t scanout, const gpu::FrameView& frame,
                                   const gpu::Rect&) {
  observer_->on_frame(scanout, frame.size, gpu::FrameHash(frame));
}

Result<Vgpu::Parts> Vgpu::MakeParts(const VgpuConfig& config) {
  Parts parts;
  parts.container = std::make_unique<domain::Container>();
  MVGPU_ASSIGN_OR_RETURN(parts.pin_backend, MakePinBackend(config.pin));
  MVGPU_RETURN_IF_ERROR(AddMapper(config, &parts));
  return parts;
}

void Vgpu::Parts::go_through(std::unique_ptr<domain::AssignedIommu> device_iommu) {
  space = std::make_unique<domain::AssignedSpace>(std::move(device_iommu),
                                                  domain::AssignedSpace::Options{});
  if (space->holds_memory()) pin_backend = domain::MakeMappingPinBackend(space.get());
  mapper = std::make_unique<dma::IommuMapper>(space.get());
}

Result<std::unique_ptr<Vgpu>> Vgpu::Create(VgpuConfig config, Parts parts,
                                           SessionObserver* observer, Owner* owner) {
  std::unique_ptr<Vgpu> vgpu(new Vgpu(std::move(config), std::move(parts), observer, owner));
  MVGPU_RETURN_IF_ERROR(vgpu->Assemble());
  return vgpu;
}

Vgpu::Vgpu(VgpuConfig config, Parts parts, SessionObserver* observer, Owner* owner)
    : config_(std::move(config)),
      owner_(owner),
      remote_(parts.remote),
      observer_(observer == nullptr ? nullptr : std::make_unique<StepObserver>(observer)),
      space_(std::move(parts.space)),
      container_(std::move(parts.container)),
      pin_backend_(std::move(parts.pin_backend)),
      mapper_(std::move(parts.mapper)),
      iommu_options_(parts.iommu),
      frame_reporter_(observer_.get()),
      displays_(DisplaysFor(&screenshot_, &frame_reporter_, observer)) {}

Result<void> Vgpu::Assemble() {
  if (!config_.vm_uuid.empty()) {
    MVGPU_ASSIGN_OR_RETURN(ledger_, domain::Ledger::Open({config_.runtime_dir, config_.vm_uuid}));
  }
  MutexLock lock(mutex_);
  domain::ApiOnlyDomain::Options options{config_.name, PagesIn(config_.pin_limit_bytes)};
  if (remote_ != nullptr) options.remote = &step_memory_;
  MVGPU_ASSIGN_OR_RETURN(domain_,
                         domain::ApiOnlyDomain::Create(std::move(options), std::move(pin_backend_),
                                                       ledger_.get(), observer_.get()));
  MVGPU_RETURN_IF_ERROR(container_->attach(domain_.get()));
  cache_ = std::make_unique<dma::DmaCache>(
      domain_.get(), mapper_.get(),
      dma::DmaCache::Options{.idle_limit_pages = PagesIn(config_.dma_idle_bytes)});
  if (iommu_options_) {
    iommu_ = std::make_unique<GuestIommu>(*iommu_options_, domain_.get());
    addresses_ = iommu_->addresses();
  }
  auto device = glue::VirtioGpuPci::Create(
      [this](gpu::GpuDevice::Owner* gpu_owner) { return MakeGpu(gpu_owner); }, domain_.get(),
      container_.get(), this);
  if (!device) return tl::unexpected<Error>(std::move(device).error());
  device_ = std::move(*device);
  return {};
}

Result<std::unique_ptr<gpu::GpuDevice>> Vgpu::MakeGpu(gpu::GpuDevice::Owner* gpu_owner) {
  gpu_owner_ = std::make_unique<GpuOwner>(gpu_owner, owner_);
  MVGPU_ASSIGN_OR_RETURN(
      auto gpu, gpu::GpuDevice::Create(config_.gpu, cache_.get(), domain_.get(), &displays_,
                                       gpu_owner_.get(), addresses_.translations()));
  return observer_ == nullptr ? std::move(gpu) : ObserveGpu(std::move(gpu), observer_.get());
}

Vgpu::~Vgpu() {
  device_.reset();
  if (domain_ != nullptr) MVGPU_CHECK(container_->detach(domain_.get()).has_value());
}

bool Vgpu::step(uint16_t queue) {
  Step step{queue};
  while (!Advance(step)) step.exchange.run(*remote_);
  return step.did;
}

bool Vgpu::Advance(Step& step) {
  MutexLock lock(mutex_);
  if (auto put = step_memory_.put(std::exchange(step.exchange, {})); !put) {
    step.did = false;
    step_memory_.forget_everything();
    if (put.error().code() == ErrorCode::kProtocol) return true;
    device_->stop_queue(tried_queue_, put.error());
  }
  // What an earlier step has left to write comes first; so do a step's writes, before its reads.
  const bool is_pending = !step.is_done && !step_memory_.next_write() && !Try(step);
  if (step_memory_.next_write() && !MayWrite(step.queue)) {
    step.did = false;
    step_memory_.forget_reads();
    return true;
  }
  if (step_memory_.next_write() || (is_pending && step_memory_.is_missing_reads())) {
    Take(step);
    return false;
  }
  if (is_pending) step_memory_.forget_reads();  // for pages of the guest's: use_iommu() goes on
  device_->deliver_interrupts();
  ShowCache();
  return true;
}

void Vgpu::on_driver_reset() {
  step_memory_.forget_everything();
  if (iommu_ != nullptr) iommu_->space().cancel();
}

bool Vgpu::recheck() {
  MutexLock lock(mutex_);
  if (cache_->counters().cached_pages == 0) return false;
  const uint64_t moved = cache_->recheck();
  if (moved == 0) return true;
  moved_pages_ += moved;
  ShowCache();
  TellAccounts();
  owner_->on_moved_pages(moved);
  return true;
}

void Vgpu::use_iommu(const std::function<void(GuestIommu&)>& access) {
  MutexLock lock(mutex_);
  MVGPU_CHECK(iommu_ != nullptr);
  const uint64_t answered = iommu_->pages_answered();
  access(*iommu_);
  ShowCache();
  TellAccounts();
  if (iommu_->pages_answered() != answered) owner_->on_doorbell(glue::VirtioGpu::kControlQueue);
}

domain::DeviceAddressSpace::Kind Vgpu::addresses() const {
  MutexLock lock(mutex_);
  return addresses_.kind();
}

void Vgpu::ShowCache() {
  if (ledger_ == nullptr) return;
  if (space_ != nullptr) domain_->show_locked();
  const dma::DmaCache::Counters now = cache_->counters();
  domain_->show_cache({.cached_pages = now.cached_pages,
                       .idle_pages = now.idle_pages,
                       .hit_pages = now.hit_pages,
                       .miss_pages = now.miss_pages,
                       .unmapped_pages = now.unmapped_pages,
                       .revoked_pages = now.revoked_pages,
                       .evicted_pages = now.evicted_pages,
                       .map_calls = now.map_calls,
                       .mapper_calls = now.mapper_calls,
                       .revocations = now.revocations,
                       .moved_pages = moved_pages_});
}

void Vgpu::NotePeaks() {
  const dma::DmaCache::Counters now = cache_->counters();
  peak_cached_pages_ = std::max(peak_cached_pages_, now.cached_pages);
  peak_idle_pages_ = std::max(peak_idle_pages_, now.idle_pages);
}

void Vgpu::TellAccounts() {
  if (observer_ == nullptr) return;
  const domain::ApiOnlyDomain::Counters now = domain_->counters();
  const AccountFigures figures{now.mapped_pages, now.pinned_pages, now.unique_pages,
                               now.charged_pages, now.locked_pages};
  if (figures == std::exchange(told_accounts_, figures)) return;
  observer_->on_accounts(figures);
}

void Vgpu::TellAccountsOfStep() {
  if (observer_ == nullptr) return;
  // All pins are the cache's. Counting charges takes time, and there are many steps.
  const dma::DmaCache::Counters cache = cache_->counters();
  const uint64_t changes = cache.miss_pages + cache.unmapped_pages;
  if (changes != std::exchange(told_cache_changes_, changes)) TellAccounts();
}

bool Vgpu::Try(Step& step) {
  tried_queue_ = step.queue;
  step_memory_.begin_attempt();
  if (observer_ != nullptr) observer_->begin_attempt();
  const auto processed = device_->process_one(step.queue);
  if (processed == glue::VirtioPciDevice::Processed::kPending) {
    if (observer_ != nullptr) observer_->drop();
    return false;
  }
  NotePeaks();
  if (observer_ != nullptr) {
    observer_->pass_on();
    observer_->on_step(step.queue);
    TellAccountsOfStep();
  }
  step_memory_.forget_reads();
  step.is_done = true;
  step.did = processed == glue::VirtioPciDevice::Processed::kOne;
  return true;
}

bool Vgpu::MayWrite(uint16_t queue) {
  const auto mapped = domain_->check_copy(*step_memory_.next_write(), domain::Access::kWrite);
  if (mapped) return true;
  const ErrorCode code = mapped.error().code();
  if (code == ErrorCode::kNotMapped || code == ErrorCode::kBusy) {
    device_->wait_for_memory(tried_queue_, mapped.error());
    device_->wait_for_memory(queue, mapped.error());
  } else {
    step_memory_.forget_everything();
    device_->stop_queue(tried_queue_, mapped.error());
  }
  return false;
}

void Vgpu::Take(Step& step) {
  step.exchange = step_memory_.take();
  if (!std::exchange(has_used_remote_, true)) owner_->on_remote_memory(step.exchange.iova());
}

Vgpu::Counters Vgpu::counters() const {
  MutexLock lock(mutex_);
  return {container_->totals(), domain_->counters(), cache_->counters(), device_->gpu().counters(),
          peak_cached_pages_,   peak_idle_pages_,    moved_pages_};
}

std::string Vgpu::session_json() const {
  const Counters now = counters();
  const json object = {
      {"pin_calls", now.domain.pin_calls},
      {"pages_pinned", now.domain.pages_pinned},
      {"pages_pinned_first", now.domain.pages_locked_first},
      {"peak_unique_pages", now.domain.peak_unique_pages},
      {"revocations", now.domain.revocations},
      {"dma_map_calls", now.cache.map_calls},
      {"dma_hit_pages", now.cache.hit_pages},
      {"dma_miss_pages", now.cache.miss_pages},
      {"dma_unmapped_pages", now.cache.unmapped_pages},
      {"dma_revoked_pages", now.cache.revoked_pages},
      {"dma_revocations", now.cache.revocations},
      {"dma_mapper_calls", now.cache.mapper_calls},
      {"dma_evicted_pages", now.cache.evicted_pages},
      {"dma_peak_cached_pages", now.peak_cached_pages},
      {"dma_peak_cached_bytes", BytesIn(now.peak_cached_pages)},
      {"dma_peak_idle_pages", now.peak_idle_pages},
      {"dma_peak_idle_bytes", BytesIn(now.peak_idle_pages)},
      {"control_commands", now.gpu.control_commands},
      {"cursor_commands", now.gpu.cursor_commands},
      {"failed_commands", now.gpu.failed_commands},
      {"frames", now.gpu.frames},
      {"transferred_bytes", now.gpu.transferred_bytes},
      {"final_picture", fmt::format("{:016x}", screenshot_.hash(0).value_or(0))},
  };
  return object.dump();
}

glue::VfioDevice::RegionInfo Vgpu::region_info(uint32_t region) const {
  MutexLock lock(mutex_);
  return device_->vfio_device().region_info(region);
}

glue::VfioDevice::IrqInfo Vgpu::irq_info(uint32_t irq) const {
  MutexLock lock(mutex_);
  return device_->vfio_device().irq_info(irq);
}

void Vgpu::region_read(uint32_t region, uint64_t offset, std::span<std::byte> data) {
  MutexLock lock(mutex_);
  device_->vfio_device().region_read(region, offset, data);
  if (observer_ != nullptr) observer_->on_region_read(region, offset, data);
}

void Vgpu::region_write(uint32_t region, uint64_t offset, std::span<const std::byte> data) {
  MutexLock lock(mutex_);
  if (observer_ != nullptr) observer_->on_region_write(region, offset, data);
  device_->vfio_device().region_write(region, offset, data);
  NotePeaks();  // a driver's reset leaves pages idle
  ShowCache();
}

void Vgpu::bind_irqs(uint32_t irq, uint32_t start, std::vector<UniqueFd> eventfds) {
  MutexLock lock(mutex_);
  if (observer_ != nullptr) {
    for (size_t i = 0; i < eventfds.size(); ++i) {
      observer_->on_irqs(irq, eventfds[i].is_valid() ? TraceIrqOp::kBind : TraceIrqOp::kUnbind,
                         start + static_cast<uint32_t>(i), 1);
    }
  }
  device_->vfio_device().bind_irqs(irq, start, std::move(eventfds));
}

void Vgpu::disable_irqs(uint32_t irq) {
  MutexLock lock(mutex_);
  if (observer_ != nullptr) observer_->on_irqs(irq, TraceIrqOp::kDisable, 0, 0);
  device_->vfio_device().disable_irqs(irq);
}

void Vgpu::trigger_irq(uint32_t irq, uint32_t vector) {
  MutexLock lock(mutex_);
  if (observer_ != nullptr) observer_->on_irqs(irq, TraceIrqOp::kTrigger, vector, 1);
  device_->vfio_device().trigger_irq(irq, vector);
}

void Vgpu::set_irq_masked(uint32_t irq, uint32_t vector, bool masked) {
  MutexLock lock(mutex_);
  if (observer_ != nullptr) {
    observer_->on_irqs(irq, masked ? TraceIrqOp::kMask : TraceIrqOp::kUnmask, vector, 1);
  }
  device_->vfio_device().set_irq_masked(irq, vector, masked);
}

void Vgpu::reset() {
  MutexLock lock(mutex_);
  if (observer_ != nullptr) observer_->on_reset();
  device_->vfio_device().reset();
  NotePeaks();
  ShowCache();
  TellAccounts();
}

Result<void> Vgpu::dma_map(domain::Container::MapRequest request) {
  const auto range = IovaRange::FromStartAndSize(request.iova, request.size);
  const domain::Access access = request.access;
  MutexLock lock(mutex_);
  const SessionObserver::Backing backing =
      observer_ != nullptr ? BackingOf(request) : SessionObserver::Backing{};
  const uint64_t unsealed = container_->unsealed_files_seen();
  step_memory_.forget_reads();
  MVGPU_RETURN_IF_ERROR(device_->vfio_device().dma_map(std::move(request)));
  if (observer_ != nullptr) observer_->on_map(*range, access, backing);
  TellAccounts();
  if (container_->unsealed_files_seen() != unsealed) owner_->on_unsealed_memory(*range);
  return {};
}

Result<uint64_t> Vgpu::dma_unmap(Iova start, uint64_t size) {
  MutexLock lock(mutex_);
  step_memory_.forget_reads();
  MVGPU_ASSIGN_OR_RETURN(const uint64_t bytes, device_->vfio_device().dma_unmap(start, size));
  ShowCache();
  if (observer_ != nullptr) observer_->on_unmap(start, size);
  TellAccounts();
  return bytes;
}

Result<uint64_t> Vgpu::dma_unmap_all() {
  MutexLock lock(mutex_);
  step_memory_.forget_reads();
  MVGPU_ASSIGN_OR_RETURN(const uint64_t bytes, device_->vfio_device().dma_unmap_all());
  ShowCache();
  if (observer_ != nullptr) observer_->on_unmap_all();
  TellAccounts();
  return bytes;
}

}  // namespace mvgpu::backend
