// A guest's VT-d IOMMU in scalable mode, and listeners at the object behind it: the notifiers by
// which a host follows PASIDs.

#include <fmt/format.h>

#include <array>
#include <memory>
#include <string>

#include "apionly-domain/viommu/vtd_iommu.h"
#include "backend/scenario/commands.h"
#include "backend/scenario/viommu.h"

namespace mvgpu::backend::scenario {

namespace {

using domain::DeviceSpace;
using domain::IommuEventKind;
using domain::SourceId;
using domain::VtdRequest;

// Guest-physical memory as the device reads it behind the unit.
Result<std::string> BytesAt(Guest* guest, uint64_t address, uint64_t count) {
  std::array<std::byte, 32> bytes{};
  MVGPU_RETURN_IF_ERROR(CheckBounds("number of bytes", count, 1, bytes.size()));
  const auto part = std::span(bytes).first(count);
  MVGPU_RETURN_IF_ERROR(guest->domain().read(Iova(address), part));
  return HexOf(part);
}

Result<std::string> MakeUnit(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Guest* const guest, world.guest());
  MVGPU_RETURN_IF_ERROR(CheckBounds("requester", arguments.numbers[0], 0, UINT16_MAX));
  MVGPU_RETURN_IF_ERROR(
      world.add(std::make_unique<Viommu>(guest, static_cast<SourceId>(arguments.numbers[0]))));
  return std::string("in bypass");
}

Result<std::string> SetRoot(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Viommu* const viommu, world.part<Viommu>());
  viommu->use([&](GuestIommu& iommu) { iommu.unit().set_root(arguments.numbers[0]); });
  return std::string("done");
}

Result<std::string> SetTranslating(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Viommu* const viommu, world.part<Viommu>());
  const bool is_on = arguments.words[0] == "on";
  viommu->use([&](GuestIommu& iommu) { iommu.unit().set_translating(is_on); });
  return std::string("done");
}

Result<std::string> BeginQueue(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Viommu* const viommu, world.part<Viommu>());
  viommu->begin_queue(arguments.numbers[0]);
  return std::string("enabled");
}

Result<std::string> Post(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Viommu* const viommu, world.part<Viommu>());
  MVGPU_RETURN_IF_ERROR(viommu->post(arguments.numbers[0], arguments.numbers[1]));
  return std::string("posted");
}

// What is left in the queue; empty: nothing.
std::string QueueText(GuestIommu& iommu) {
  const domain::InvalidationQueue& queue = iommu.unit().queue();
  if (const auto error = queue.error()) {
    return fmt::format("stopped code {}", static_cast<unsigned>(*error));
  }
  return queue.has_more() ? fmt::format("head {:#x} tail {:#x}", queue.head(), queue.tail()) : "";
}

Result<std::string> RunQueue(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Viommu* const viommu, world.part<Viommu>());
  viommu->run_queue(arguments.numbers[0]);
  const std::string left = viommu->ask(QueueText);
  return left.empty() ? "done" : left;
}

Result<std::string> Invalidate(World& world, const Arguments& arguments) {
  MVGPU_RETURN_IF_ERROR(Post(world, arguments));
  return RunQueue(world, {.numbers = {256}, .words = {}});
}

Result<std::string> SetTablePlace(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Viommu* const viommu, world.part<Viommu>());
  viommu->tables().set_next(arguments.numbers[0]);
  return std::string("done");
}

// P, US, A, D and RW of the first stage; R and W of the second.
Result<std::string> MapFirstStage(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Viommu* const viommu, world.part<Viommu>());
  const auto& numbers = arguments.numbers;
  MVGPU_ASSIGN_OR_RETURN(const uint64_t place,
                         viommu->tables().find_entry(numbers[0], numbers[1], 0x7));
  MVGPU_ASSIGN_OR_RETURN(Guest* const guest, world.guest());
  const uint64_t flags = arguments.words[0] == "r" ? 0x5 : 0x7;
  MVGPU_RETURN_IF_ERROR(guest->store64(place, (numbers[2] & ~kPageMask) | flags));
  return fmt::format("entry at {:#x}", place);
}

Result<std::string> MapSecondStage(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Viommu* const viommu, world.part<Viommu>());
  const auto& numbers = arguments.numbers;
  MVGPU_ASSIGN_OR_RETURN(const uint64_t place,
                         viommu->tables().find_entry(numbers[0], numbers[1], 0x3));
  MVGPU_ASSIGN_OR_RETURN(Guest* const guest, world.guest());
  const uint64_t flags = arguments.words[0] == "r" ? 0x1 : 0x3;
  MVGPU_RETURN_IF_ERROR(guest->store64(place, (numbers[2] & ~kPageMask) | flags));
  return fmt::format("entry at {:#x}", place);
}

Result<VtdRequest> RequestOf(std::span<const uint64_t> numbers, bool has_pasid,
                             domain::Access access) {
  VtdRequest request;
  MVGPU_RETURN_IF_ERROR(CheckBounds("requester", numbers[0], 0, UINT16_MAX));
  request.source = static_cast<SourceId>(numbers[0]);
  if (has_pasid) {
    MVGPU_RETURN_IF_ERROR(CheckBounds("PASID", numbers[1], 0, domain::vtd::kPasidMask));
    request.pasid = static_cast<domain::Pasid>(numbers[1]);
  }
  request.address = numbers[has_pasid ? 2 : 1];
  request.wanted = access;
  return request;
}

Result<std::string> Translate(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Viommu* const viommu, world.part<Viommu>());
  const bool has_pasid = arguments.numbers.size() == 3;
  MVGPU_ASSIGN_OR_RETURN(const VtdRequest request,
                         RequestOf(arguments.numbers, has_pasid, AccessOfWord(arguments.words[0])));
  const auto target =
      viommu->ask([&](GuestIommu& iommu) { return iommu.unit().translate(request); });
  if (target) return fmt::format("{:#x}", target->address);
  return fmt::format("fault {:#x}", target.error().reason);
}

Result<std::string> DeviceReads(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Viommu* const viommu, world.part<Viommu>());
  MVGPU_ASSIGN_OR_RETURN(const VtdRequest request,
                         RequestOf(arguments.numbers, true, domain::Access::kRead));
  const auto target =
      viommu->ask([&](GuestIommu& iommu) { return iommu.unit().translate(request); });
  if (!target) return fmt::format("fault {:#x}", target.error().reason);
  const uint64_t count = arguments.numbers[3];
  MVGPU_RETURN_IF_ERROR(CheckBounds("number of bytes", count, 1, target->length));
  MVGPU_ASSIGN_OR_RETURN(Guest* const guest, world.guest());
  return BytesAt(guest, target->address, count);
}

Result<std::string> RequestPage(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Viommu* const viommu, world.part<Viommu>());
  MVGPU_ASSIGN_OR_RETURN(const VtdRequest request,
                         RequestOf(arguments.numbers, true, AccessOfWord(arguments.words[0])));
  MVGPU_RETURN_IF_ERROR(CheckBounds("group", arguments.numbers[3], 0, 511));
  domain::FaultGroup group{.device = request.source,
                           .pasid = request.pasid,
                           .id = static_cast<uint32_t>(arguments.numbers[3])};
  group.requests.push_back({.rights = request.wanted.rights, .address = request.address});
  MVGPU_RETURN_IF_ERROR(viommu->request_pages(std::move(group)));
  return std::string("asked");
}

Result<std::string> Answers(World& world, const Arguments&) {
  MVGPU_ASSIGN_OR_RETURN(Viommu* const viommu, world.part<Viommu>());
  return viommu->take_answers();
}

Result<std::string> SetPageQueue(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Viommu* const viommu, world.part<Viommu>());
  const uint64_t ring = arguments.numbers[0] & ~kPageMask;
  viommu->use([&](GuestIommu& iommu) { iommu.unit().page_requests().set_address(ring); });
  return std::string("empty");
}

// The guest's driver takes what is in its queue, and is told of the next one.
Result<std::string> TakePageRequests(World& world, const Arguments&) {
  MVGPU_ASSIGN_OR_RETURN(Viommu* const viommu, world.part<Viommu>());
  return viommu->ask([](GuestIommu& iommu) {
    constexpr uint64_t kEntryBytes = 32;
    domain::VtdPageRequestQueue& queue = iommu.unit().page_requests();
    const uint64_t entries = (queue.tail() - queue.head()) % kPageSize / kEntryBytes;
    queue.set_head(queue.tail());
    queue.clear_status(domain::VtdPageRequestQueue::kPending);
    return fmt::format("{}", entries);
  });
}

Result<std::string> Listen(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Viommu* const viommu, world.part<Viommu>());
  domain::IommuEventKinds kinds = domain::kAllIommuEvents;
  if (arguments.words[1] == "bindings") {
    kinds = IommuEventKind::kBindPasid | IommuEventKind::kUnbindPasid;
  }
  MVGPU_RETURN_IF_ERROR(viommu->listen(arguments.words[0], {.kinds = kinds}));
  return std::string("registered");
}

Result<std::string> ListenToSpace(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Viommu* const viommu, world.part<Viommu>());
  MVGPU_RETURN_IF_ERROR(CheckBounds("requester", arguments.numbers[0], 0, UINT16_MAX));
  MVGPU_RETURN_IF_ERROR(CheckBounds("PASID", arguments.numbers[1], 0, domain::vtd::kPasidMask));
  const DeviceSpace space{static_cast<SourceId>(arguments.numbers[0]),
                          static_cast<domain::Pasid>(arguments.numbers[1])};
  MVGPU_RETURN_IF_ERROR(viommu->listen(arguments.words[0], {.space = space}));
  return std::string("registered");
}

Result<std::string> Unlisten(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Viommu* const viommu, world.part<Viommu>());
  MVGPU_RETURN_IF_ERROR(viommu->unlisten(arguments.words[0]));
  return std::string("removed");
}

Result<std::string> Heard(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Viommu* const viommu, world.part<Viommu>());
  MVGPU_ASSIGN_OR_RETURN(IommuHearing* const listener, viommu->listener(arguments.words[0]));
  return listener->take();
}

std::string FigureOf(GuestIommu& iommu, std::string_view which) {
  const auto& counters = iommu.unit().counters();
  const GuestIommu::Events& events = iommu.events();
  if (which == "bypassed") {
    const bool is_bypassed =
        iommu.addresses().kind() == domain::DeviceAddressSpace::Kind::kBypassed;
    return is_bypassed ? "yes" : "no";
  }
  if (which == "bindings") return fmt::format("{}", iommu.object().bindings().size());
  if (which == "walks") return fmt::format("{}", counters.walks);
  if (which == "hits") return fmt::format("{}", counters.page_hits);
  if (which == "faults") return fmt::format("{}", counters.faults);
  if (which == "fault-events") return fmt::format("{}", events.faults);
  if (which == "page-request-events") return fmt::format("{}", events.page_requests);
  return fmt::format("{}", events.waits);
}

Result<std::string> Figure(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Viommu* const viommu, world.part<Viommu>());
  return viommu->ask([&](GuestIommu& iommu) { return FigureOf(iommu, arguments.words[0]); });
}

Result<std::string> FaultRecord(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Viommu* const viommu, world.part<Viommu>());
  return viommu->ask([&](GuestIommu& iommu) -> Result<std::string> {
    domain::FaultLog& faults = iommu.unit().faults();
    MVGPU_RETURN_IF_ERROR(CheckBounds("record", arguments.numbers[0], 0, faults.size() - 1));
    const auto& words = faults.words(arguments.numbers[0]);
    return fmt::format("{:#x} {:#x}", words.low, words.high);
  });
}

constexpr Command kCommands[] = {
    {Viommu::kMaker, MakeUnit},
    {"vtd-root RTADDR", SetRoot},
    {"vtd-translation on|off", SetTranslating},
    {"vtd-queue RING", BeginQueue},
    {"vtd-invalidate LOW HIGH", Invalidate},
    {"vtd-post LOW HIGH", Post},
    {"vtd-run DESCRIPTORS", RunQueue},
    {"vtd-tables PLACE", SetTablePlace},
    {"vtd-first-stage ROOT map ADDRESS FRAME r|rw", MapFirstStage},
    {"vtd-second-stage ROOT map ADDRESS FRAME r|rw", MapSecondStage},
    {"vtd-translate RID PASID ADDRESS r|w|rw", Translate},
    {"vtd-translate RID no-pasid ADDRESS r|w|rw", Translate},
    {"vtd-bytes RID PASID ADDRESS COUNT", DeviceReads},
    {"vtd-page-queue RING", SetPageQueue},
    {"vtd-page-entries", TakePageRequests},
    {"vtd-page-request RID PASID ADDRESS GROUP r|w|rw", RequestPage},
    {"vtd-answers", Answers},
    {"listen NAME all|bindings", Listen},
    {"listen NAME to RID PASID", ListenToSpace},
    {"unlisten NAME", Unlisten},
    {"heard NAME", Heard},
    {"vtd bypassed|bindings|walks|hits|faults|fault-events|wait-events|page-request-events",
     Figure},
    {"vtd-fault RECORD", FaultRecord},
};

}  // namespace

std::span<const Command> ViommuCommands() { return kCommands; }

}  // namespace mvgpu::backend::scenario
