// The vGPU itself, behind the IOMMU that the guest sees: its DMA is under a PASID, the addresses in
// its commands are those of a process. The guest's driver, the VMM's mappings, what is shown.

#include <fmt/format.h>
#include <unistd.h>

#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>

#include "backend/scenario/commands.h"
#include "backend/scenario/gpu_driver.h"
#include "backend/scenario/viommu.h"
#include "backend/vgpu.h"
#include "gpu-model/protocol.h"

namespace mvgpu::backend::scenario {

namespace {

namespace wire = gpu::wire;

// A vGPU as the backend makes them. It works when it was rung for, on the scenario's thread.
class VgpuPart final : public World::Part, private Vgpu::Owner {
 public:
  static constexpr World::Slot kSlot = World::Slot::kVgpu;
  static constexpr std::string_view kMaker = "vgpu RID PASID with|without page-requests";

  static constexpr uint64_t kMostPixelBytes = 16u << 20;  // of all resources

  static Result<std::unique_ptr<VgpuPart>> Create(Guest* guest, PinMode pin,
                                                  const GuestIommu::Options& iommu) {
    std::unique_ptr<VgpuPart> part(new VgpuPart(guest));
    VgpuConfig config;
    config.vm_uuid = Guest::kUuid;
    config.runtime_dir = guest->runtime_dir();
    config.pin = pin;
    config.gpu.host_memory_limit = kMostPixelBytes;
    MVGPU_ASSIGN_OR_RETURN(auto parts, Vgpu::MakeParts(config));
    parts.iommu = iommu;
    MVGPU_ASSIGN_OR_RETURN(part->vgpu_,
                           Vgpu::Create(std::move(config), std::move(parts), nullptr, part.get()));
    return part;
  }

  World::Left end() override {
    vgpu_->reset();
    static_cast<void>(vgpu_->dma_unmap_all());
    const Vgpu::Counters now = vgpu_->counters();
    return {.pinned_pages = now.domain.pinned_pages + now.cache.cached_pages,
            .locked_pages = now.domain.locked_pages,
            .charged_pages = now.domain.charged_pages,
            .mappings = now.container.mappings};
  }

  Vgpu& vgpu() { return *vgpu_; }
  Guest& guest() { return guest_; }

  Result<void> boot(uint64_t place) {
    driver_.emplace(&guest_, vgpu_.get(), place);
    queue_error_.reset();
    auto booted = driver_->boot();
    if (!booted) driver_.reset();
    return booted;
  }
  Result<GpuDriver*> driver() {
    if (driver_) return &*driver_;
    return Fail(ErrorCode::kInvalid, "the vgpu has no driver: 'gpu-boot PLACE' comes first");
  }
  // What the device thread does, and what came of the request.
  Result<std::string> work() {
    MVGPU_ASSIGN_OR_RETURN(GpuDriver* const driver, this->driver());
    if (!driver->is_waiting()) return std::string("nothing");
    while (std::exchange(is_rung_, false)) {
      while (vgpu_->step(glue::VirtioGpu::kControlQueue)) continue;
    }
    if (queue_error_) return tl::unexpected(*queue_error_);
    const auto type = driver->take_response();
    return type ? ToText(static_cast<wire::Response>(*type)) : "waiting";
  }

 private:
  explicit VgpuPart(Guest* guest) : guest_(*guest) {}

  static std::string ToText(wire::Response type) {
    switch (type) {
      case wire::Response::kOkNodata:
        return "ok";
      case wire::Response::kErrUnspec:
        return "refused unspec";
      case wire::Response::kErrOutOfMemory:
        return "refused out-of-memory";
      case wire::Response::kErrInvalidScanoutId:
        return "refused scanout-id";
      case wire::Response::kErrInvalidResourceId:
        return "refused resource-id";
      case wire::Response::kErrInvalidParameter:
        return "refused parameter";
      default:
        return fmt::format("response {:#x}", static_cast<uint32_t>(type));
    }
  }

  void on_doorbell(uint16_t queue) override { is_rung_ |= queue == glue::VirtioGpu::kControlQueue; }
  void on_queue_error(uint16_t, const Error& error) override { queue_error_ = error; }
  void on_queue_waiting(uint16_t, const Error&) override {}
  void on_refused(const Error&) override {}
  void on_unsealed_memory(IovaRange) override {}
  void on_remote_memory(Iova) override {}
  void on_moved_pages(uint64_t) override {}

  Guest& guest_;  // outlives this
  bool is_rung_ = false;
  std::optional<Error> queue_error_;
  std::unique_ptr<Vgpu> vgpu_;
  std::optional<GpuDriver> driver_;
};

Result<std::string> MakeVgpu(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Guest* const guest, world.guest());
  if (world.has<Viommu>()) {
    return Fail(ErrorCode::kInvalid, "the guest has its IOMMU already, and not before a vgpu");
  }
  const auto& numbers = arguments.numbers;
  MVGPU_RETURN_IF_ERROR(CheckBounds("requester", numbers[0], 0, UINT16_MAX));
  MVGPU_RETURN_IF_ERROR(CheckBounds("PASID", numbers[1], 0, domain::vtd::kPasidMask));
  const GuestIommu::Options options{
      .space = {static_cast<domain::SourceId>(numbers[0]), static_cast<domain::Pasid>(numbers[1])},
      .asks_for_pages = arguments.words[0] == "with"};
  MVGPU_ASSIGN_OR_RETURN(auto made, VgpuPart::Create(guest, world.pin_mode(), options));
  Vgpu* const vgpu = &made->vgpu();
  // The IOMMU last: it uses the vGPU, also when it cannot be added.
  MVGPU_RETURN_IF_ERROR(world.add(std::move(made)));
  MVGPU_RETURN_IF_ERROR(world.add(std::make_unique<Viommu>(
      guest, [vgpu](const Viommu::Doing& doing) { vgpu->use_iommu(doing); })));
  return std::string(AddressesName(vgpu->addresses()));
}

Result<std::string> Map(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(VgpuPart* const part, world.part<VgpuPart>());
  domain::Container::MapRequest request;
  request.iova = Iova(arguments.numbers[0]);
  request.size = arguments.numbers[1];
  request.access = AccessOfWord(arguments.words[0]);
  request.fd.reset(dup(part->guest().memory_fd()));
  request.file_offset = arguments.numbers[2];
  MVGPU_RETURN_IF_ERROR(part->vgpu().dma_map(std::move(request)));
  return fmt::format("{} pages", PagesIn(arguments.numbers[1]));
}

Result<std::string> Unmap(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(VgpuPart* const part, world.part<VgpuPart>());
  MVGPU_ASSIGN_OR_RETURN(const uint64_t bytes,
                         part->vgpu().dma_unmap(Iova(arguments.numbers[0]), arguments.numbers[1]));
  return fmt::format("{} pages", PagesIn(bytes));
}

Result<std::string> Boot(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(VgpuPart* const part, world.part<VgpuPart>());
  MVGPU_RETURN_IF_ERROR(part->boot(arguments.numbers[0]));
  return std::string("driver-ok");
}

// One request, and how far it got: what was answered, or "waiting".
template <typename Request>
Result<std::string> Send(World& world, wire::Command command, Request request) {
  MVGPU_ASSIGN_OR_RETURN(VgpuPart* const part, world.part<VgpuPart>());
  MVGPU_ASSIGN_OR_RETURN(GpuDriver* const driver, part->driver());
  const uint32_t type = static_cast<uint32_t>(command);
  static_assert(sizeof(type) == sizeof(wire::Header::type) && sizeof(request) >= sizeof(type));
  std::memcpy(&request, &type, sizeof(type));
  MVGPU_RETURN_IF_ERROR(driver->submit(std::as_bytes(std::span(&request, 1))));
  return part->work();
}

// Numbers of commands have 32 bits.
Result<void> CheckWords(const Arguments& arguments) {
  for (const uint64_t number : arguments.numbers) {
    MVGPU_RETURN_IF_ERROR(CheckBounds("number", number, 0, UINT32_MAX));
  }
  return {};
}
uint32_t WordAt(const Arguments& arguments, size_t index) {
  return static_cast<uint32_t>(arguments.numbers[index]);
}
// The upper left part, as wide and high as the numbers behind the resource say.
wire::Rectangle PartOf(const Arguments& arguments) {
  return {0, 0, WordAt(arguments, 1), WordAt(arguments, 2)};
}

Result<std::string> CreateResource(World& world, const Arguments& arguments) {
  MVGPU_RETURN_IF_ERROR(CheckWords(arguments));
  return Send(world, wire::Command::kResourceCreate2d,
              wire::ResourceCreate2d{{},
                                     WordAt(arguments, 0),
                                     static_cast<uint32_t>(wire::Format::kB8G8R8X8),
                                     WordAt(arguments, 1),
                                     WordAt(arguments, 2)});
}

Result<std::string> AttachBacking(World& world, const Arguments& arguments) {
  struct Request {
    wire::ResourceAttachBacking head;
    wire::MemEntry entry;
  };
  const auto& numbers = arguments.numbers;
  MVGPU_RETURN_IF_ERROR(CheckBounds("resource", numbers[0], 0, UINT32_MAX));
  MVGPU_RETURN_IF_ERROR(CheckBounds("length", numbers[2], 0, UINT32_MAX));
  return Send(world, wire::Command::kResourceAttachBacking,
              Request{{{}, WordAt(arguments, 0), 1}, {numbers[1], WordAt(arguments, 2), 0}});
}

template <wire::Command kCommand>
Result<std::string> OfResource(World& world, const Arguments& arguments) {
  MVGPU_RETURN_IF_ERROR(CheckWords(arguments));
  return Send(world, kCommand, wire::ResourceCommand{{}, WordAt(arguments, 0), 0});
}

Result<std::string> SetScanout(World& world, const Arguments& arguments) {
  MVGPU_RETURN_IF_ERROR(CheckWords(arguments));
  return Send(world, wire::Command::kSetScanout,
              wire::SetScanout{{}, PartOf(arguments), 0, WordAt(arguments, 0)});
}

Result<std::string> Transfer(World& world, const Arguments& arguments) {
  MVGPU_RETURN_IF_ERROR(CheckWords(arguments));
  return Send(world, wire::Command::kTransferToHost2d,
              wire::TransferToHost2d{{}, PartOf(arguments), 0, WordAt(arguments, 0), 0});
}

Result<std::string> Flush(World& world, const Arguments& arguments) {
  MVGPU_RETURN_IF_ERROR(CheckWords(arguments));
  return Send(world, wire::Command::kResourceFlush,
              wire::ResourceFlush{{}, PartOf(arguments), WordAt(arguments, 0), 0});
}

Result<std::string> TakeAnswer(World& world, const Arguments&) {
  MVGPU_ASSIGN_OR_RETURN(VgpuPart* const part, world.part<VgpuPart>());
  return part->work();
}

// 0xXXRRGGBB.
Result<std::string> Pixel(World& world, const Arguments& arguments) {
  MVGPU_RETURN_IF_ERROR(CheckWords(arguments));
  MVGPU_ASSIGN_OR_RETURN(VgpuPart* const part, world.part<VgpuPart>());
  const auto pixel = part->vgpu().picture().pixel(0, WordAt(arguments, 0), WordAt(arguments, 1));
  return pixel ? fmt::format("{:#x}", *pixel) : "none";
}

Result<std::string> Picture(World& world, const Arguments&) {
  MVGPU_ASSIGN_OR_RETURN(VgpuPart* const part, world.part<VgpuPart>());
  const auto hash = part->vgpu().picture().hash(0);
  return hash ? fmt::format("{:#x}", *hash) : "none";
}

Result<std::string> Addresses(World& world, const Arguments&) {
  MVGPU_ASSIGN_OR_RETURN(VgpuPart* const part, world.part<VgpuPart>());
  return std::string(AddressesName(part->vgpu().addresses()));
}

Result<std::string> Figure(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(VgpuPart* const part, world.part<VgpuPart>());
  const Vgpu::Counters now = part->vgpu().counters();
  const std::string& which = arguments.words[0];
  if (which == "pinned") return fmt::format("{}", now.domain.pinned_pages);
  if (which == "cached") return fmt::format("{}", now.cache.cached_pages);
  if (which == "translated") return fmt::format("{}", now.gpu.translated_pages);
  if (which == "commands") return fmt::format("{}", now.gpu.control_commands);
  if (which == "failed") return fmt::format("{}", now.gpu.failed_commands);
  if (which == "frames") return fmt::format("{}", now.gpu.frames);
  return fmt::format("{}", now.gpu.transferred_bytes);
}

constexpr Command kCommands[] = {
    {VgpuPart::kMaker, MakeVgpu},
    {"vgpu-map IOVA SIZE at OFFSET r|w|rw", Map},
    {"vgpu-unmap IOVA SIZE", Unmap},
    {"vgpu-addresses", Addresses},
    {"vgpu-figure pinned|cached|translated|commands|failed|frames|transferred", Figure},
    {"gpu-boot PLACE", Boot},
    {"gpu-create RESOURCE WIDTH HEIGHT", CreateResource},
    {"gpu-attach RESOURCE ADDRESS LENGTH", AttachBacking},
    {"gpu-detach RESOURCE", OfResource<wire::Command::kResourceDetachBacking>},
    {"gpu-unref RESOURCE", OfResource<wire::Command::kResourceUnref>},
    {"gpu-scanout RESOURCE WIDTH HEIGHT", SetScanout},
    {"gpu-transfer RESOURCE WIDTH HEIGHT", Transfer},
    {"gpu-flush RESOURCE WIDTH HEIGHT", Flush},
    {"gpu-answer", TakeAnswer},
    {"gpu-pixel X Y", Pixel},
    {"gpu-picture", Picture},
};

}  // namespace

std::span<const Command> VgpuCommands() { return kCommands; }

}  // namespace mvgpu::backend::scenario
