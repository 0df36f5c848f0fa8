// A guest's VT-d IOMMU in scalable mode, and listeners at the object behind it: the notifiers by
// which a host follows PASIDs.

#include <fmt/format.h>

#include <array>
#include <map>
#include <string>
#include <vector>

#include "apionly-domain/viommu/vtd_iommu.h"
#include "backend/scenario/commands.h"
#include "backend/scenario/table_builder.h"
#include "backend/scenario/world.h"

namespace mvgpu::backend::scenario {

namespace {

using domain::DeviceSpace;
using domain::IommuEvent;
using domain::IommuEventKind;
using domain::SourceId;
using domain::VtdRequest;

std::string ToText(const DeviceSpace& space) {
  return space.pasid ? fmt::format("{:#x}/{:#x}", space.source, *space.pasid)
                     : fmt::format("{:#x}", space.source);
}

std::string ToText(const IovaRange& range) {
  if (range.size() == 0) return "all";
  return fmt::format("{:#x}+{:#x}", range.start().value(), range.size());
}

std::string ToText(const domain::PasidBinding& binding) {
  return fmt::format("type {} did {:#x} first {:#x} second {:#x}",
                     static_cast<unsigned>(binding.translation), binding.domain,
                     binding.first_stage, binding.second_stage);
}

struct Describe {
  std::string operator()(const domain::MapEvent& e) const {
    return fmt::format("map {} to {:#x}", ToText(e.range), e.out.value());
  }
  std::string operator()(const domain::UnmapEvent& e) const {
    return fmt::format("unmap {}", ToText(e.range));
  }
  std::string operator()(const domain::DeviceTlbUnmapEvent& e) const {
    return fmt::format("device-tlb {}", ToText(e.range));
  }
  std::string operator()(const domain::BindPasidEvent& e) const {
    return fmt::format("bind {}", ToText(e.binding));
  }
  std::string operator()(const domain::UnbindPasidEvent& e) const {
    return fmt::format("unbind did {:#x}", e.binding.domain);
  }
  std::string operator()(const domain::PasidIotlbEvent& e) const {
    return fmt::format("pasid-iotlb {}", ToText(e.range));
  }
  std::string operator()(const domain::PasidCacheEvent&) const { return "pasid-cache"; }
  std::string operator()(const domain::PageRequestEvent& e) const {
    return fmt::format("page-request {:#x} {} group {:#x} last {}", e.page.value(),
                       WordOfAccess(e.access), e.group, e.is_last ? 1 : 0);
  }
  std::string operator()(const domain::PageResponseEvent& e) const {
    return fmt::format("page-response group {:#x} code {}", e.group,
                       static_cast<unsigned>(e.answer));
  }
};

// Keeps what it hears until it is asked.
class Listener final : public domain::IommuListener {
 public:
  void on_iommu_event(const IommuEvent& event) override {
    if (heard_.size() < kMost) {
      heard_.push_back(ToText(event.space) + " " + std::visit(Describe(), event.what));
    }
  }
  std::string take() {
    std::string text = heard_.empty() ? "nothing" : fmt::format("{}", fmt::join(heard_, " then "));
    heard_.clear();
    return text;
  }

 private:
  static constexpr size_t kMost = 64;
  std::vector<std::string> heard_;
};

class Viommu final : public World::Part,
                     public domain::FaultSource,
                     private domain::VtdIommu::Owner {
 public:
  static constexpr World::Slot kSlot = World::Slot::kViommu;
  static constexpr std::string_view kMaker = "vtd-unit RID";
  static constexpr size_t kMostListeners = 16;

  Viommu(Guest* guest, SourceId source)
      : guest_(*guest), tables_(guest), unit_({}, {&guest->domain(), &object_, this}) {
    unit_.add_device(source);
    unit_.faults().set_masked(false);
  }
  ~Viommu() override {
    for (auto& [name, listener] : listeners_) object_.remove(&listener);
  }

  domain::VtdIommu& unit() { return unit_; }
  domain::IommuObject& object() { return object_; }
  TableBuilder& tables() { return tables_; }
  uint64_t fault_events() const { return fault_events_; }
  uint64_t wait_events() const { return wait_events_; }
  uint64_t page_request_events() const { return page_request_events_; }

  Result<void> listen(const std::string& name, domain::IommuEventKinds kinds,
                      std::optional<DeviceSpace> space) {
    if (listeners_.contains(name) || listeners_.size() == kMostListeners) {
      return Fail(ErrorCode::kOverlap, fmt::format("no room for a listener '{}'", name));
    }
    object_.add(&listeners_[name], {.kinds = kinds, .space = space});
    return {};
  }
  Result<void> unlisten(const std::string& name) {
    MVGPU_ASSIGN_OR_RETURN(Listener* const there, listener(name));
    object_.remove(there);
    listeners_.erase(name);
    return {};
  }
  Result<Listener*> listener(const std::string& name) {
    const auto found = listeners_.find(name);
    if (found != listeners_.end()) return &found->second;
    return Fail(ErrorCode::kNotMapped, fmt::format("there is no listener '{}'", name));
  }

  void begin_queue(uint64_t ring) {
    ring_ = ring & ~kPageMask;
    tail_ = 0;
    unit_.queue().disable();
    unit_.queue().write_address(ring_ | uint64_t{1} << 11);
    unit_.queue().enable();
  }
  // The guest's driver: one descriptor more, and the tail behind it.
  Result<void> invalidate(uint64_t low, uint64_t high) {
    for (const uint64_t word : {low, high, uint64_t{0}, uint64_t{0}}) {
      MVGPU_RETURN_IF_ERROR(guest_.store64(ring_ + tail_, word));
      tail_ = (tail_ + sizeof(word)) % kPageSize;
    }
    unit_.queue().write_tail(tail_);
    unit_.run_queue();
    return {};
  }
  // The device's end of a page request: what it was answered.
  void on_answer(const domain::FaultGroup& group, domain::FaultAnswer answer) override {
    answers_.push_back(fmt::format("group {:#x} code {}", group.id, static_cast<unsigned>(answer)));
  }
  std::string take_answers() {
    std::string text =
        answers_.empty() ? "nothing" : fmt::format("{}", fmt::join(answers_, " then "));
    answers_.clear();
    return text;
  }
  // Guest-physical memory as the device reads it behind the unit.
  Result<std::string> bytes(uint64_t address, uint64_t count) const {
    std::array<std::byte, 32> bytes{};
    MVGPU_RETURN_IF_ERROR(CheckBounds("number of bytes", count, 1, bytes.size()));
    const auto part = std::span(bytes).first(count);
    MVGPU_RETURN_IF_ERROR(guest_.domain().read(Iova(address), part));
    return HexOf(part);
  }

 private:
  void on_fault_event() override { ++fault_events_; }
  void on_wait_event() override { ++wait_events_; }
  void on_page_request_event() override { ++page_request_events_; }
  void on_interrupt_entries_invalid(const domain::InterruptEntryInvalidation&) override {}

  Guest& guest_;
  TableBuilder tables_;
  std::vector<std::string> answers_;  // the unit's end answers what waits
  domain::IommuObject object_{{}};
  domain::VtdIommu unit_;
  std::map<std::string, Listener> listeners_;
  uint64_t ring_ = 0;
  uint64_t tail_ = 0;
  uint64_t fault_events_ = 0;
  uint64_t wait_events_ = 0;
  uint64_t page_request_events_ = 0;
};

Result<std::string> MakeUnit(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Guest* const guest, world.guest());
  MVGPU_RETURN_IF_ERROR(CheckBounds("requester", arguments.numbers[0], 0, UINT16_MAX));
  MVGPU_RETURN_IF_ERROR(
      world.add(std::make_unique<Viommu>(guest, static_cast<SourceId>(arguments.numbers[0]))));
  return std::string("in bypass");
}

Result<std::string> SetRoot(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Viommu* const viommu, world.part<Viommu>());
  viommu->unit().set_root(arguments.numbers[0]);
  return std::string("done");
}

Result<std::string> SetTranslating(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Viommu* const viommu, world.part<Viommu>());
  viommu->unit().set_translating(arguments.words[0] == "on");
  return std::string("done");
}

Result<std::string> BeginQueue(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Viommu* const viommu, world.part<Viommu>());
  viommu->begin_queue(arguments.numbers[0]);
  return std::string("enabled");
}

Result<std::string> Invalidate(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Viommu* const viommu, world.part<Viommu>());
  MVGPU_RETURN_IF_ERROR(viommu->invalidate(arguments.numbers[0], arguments.numbers[1]));
  const auto error = viommu->unit().queue().error();
  if (!error) return std::string("done");
  return fmt::format("stopped code {}", static_cast<unsigned>(*error));
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
  const auto target = viommu->unit().translate(request);
  if (target) return fmt::format("{:#x}", target->address);
  return fmt::format("fault {:#x}", target.error().reason);
}

Result<std::string> DeviceReads(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Viommu* const viommu, world.part<Viommu>());
  MVGPU_ASSIGN_OR_RETURN(const VtdRequest request,
                         RequestOf(arguments.numbers, true, domain::Access::kRead));
  const auto target = viommu->unit().translate(request);
  if (!target) return fmt::format("fault {:#x}", target.error().reason);
  const uint64_t count = arguments.numbers[3];
  MVGPU_RETURN_IF_ERROR(CheckBounds("number of bytes", count, 1, target->length));
  return viommu->bytes(target->address, count);
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
  MVGPU_RETURN_IF_ERROR(viommu->unit().submit(std::move(group), viommu));
  return std::string("asked");
}

Result<std::string> Answers(World& world, const Arguments&) {
  MVGPU_ASSIGN_OR_RETURN(Viommu* const viommu, world.part<Viommu>());
  return viommu->take_answers();
}

Result<std::string> SetPageQueue(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Viommu* const viommu, world.part<Viommu>());
  viommu->unit().page_requests().set_address(arguments.numbers[0] & ~kPageMask);
  return std::string("empty");
}

Result<std::string> Listen(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Viommu* const viommu, world.part<Viommu>());
  domain::IommuEventKinds kinds = domain::kAllIommuEvents;
  if (arguments.words[1] == "bindings") {
    kinds = IommuEventKind::kBindPasid | IommuEventKind::kUnbindPasid;
  }
  MVGPU_RETURN_IF_ERROR(viommu->listen(arguments.words[0], kinds, std::nullopt));
  return std::string("registered");
}

Result<std::string> ListenToSpace(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Viommu* const viommu, world.part<Viommu>());
  MVGPU_RETURN_IF_ERROR(CheckBounds("requester", arguments.numbers[0], 0, UINT16_MAX));
  MVGPU_RETURN_IF_ERROR(CheckBounds("PASID", arguments.numbers[1], 0, domain::vtd::kPasidMask));
  const DeviceSpace space{static_cast<SourceId>(arguments.numbers[0]),
                          static_cast<domain::Pasid>(arguments.numbers[1])};
  MVGPU_RETURN_IF_ERROR(viommu->listen(arguments.words[0], domain::kAllIommuEvents, space));
  return std::string("registered");
}

Result<std::string> Unlisten(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Viommu* const viommu, world.part<Viommu>());
  MVGPU_RETURN_IF_ERROR(viommu->unlisten(arguments.words[0]));
  return std::string("removed");
}

Result<std::string> Heard(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Viommu* const viommu, world.part<Viommu>());
  MVGPU_ASSIGN_OR_RETURN(Listener* const listener, viommu->listener(arguments.words[0]));
  return listener->take();
}

Result<std::string> Figure(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Viommu* const viommu, world.part<Viommu>());
  const std::string& which = arguments.words[0];
  const auto& counters = viommu->unit().counters();
  if (which == "bypassed") return std::string(viommu->object().is_bypassed() ? "yes" : "no");
  if (which == "bindings") return fmt::format("{}", viommu->object().bindings().size());
  if (which == "walks") return fmt::format("{}", counters.walks);
  if (which == "hits") return fmt::format("{}", counters.page_hits);
  if (which == "faults") return fmt::format("{}", counters.faults);
  if (which == "fault-events") return fmt::format("{}", viommu->fault_events());
  if (which == "page-request-events") return fmt::format("{}", viommu->page_request_events());
  return fmt::format("{}", viommu->wait_events());
}

Result<std::string> FaultRecord(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Viommu* const viommu, world.part<Viommu>());
  domain::FaultLog& faults = viommu->unit().faults();
  MVGPU_RETURN_IF_ERROR(CheckBounds("record", arguments.numbers[0], 0, faults.size() - 1));
  const auto& words = faults.words(arguments.numbers[0]);
  return fmt::format("{:#x} {:#x}", words.low, words.high);
}

constexpr Command kCommands[] = {
    {Viommu::kMaker, MakeUnit},
    {"vtd-root RTADDR", SetRoot},
    {"vtd-translation on|off", SetTranslating},
    {"vtd-queue RING", BeginQueue},
    {"vtd-invalidate LOW HIGH", Invalidate},
    {"vtd-tables PLACE", SetTablePlace},
    {"vtd-first-stage ROOT map ADDRESS FRAME r|rw", MapFirstStage},
    {"vtd-second-stage ROOT map ADDRESS FRAME r|rw", MapSecondStage},
    {"vtd-translate RID PASID ADDRESS r|w|rw", Translate},
    {"vtd-translate RID no-pasid ADDRESS r|w|rw", Translate},
    {"vtd-bytes RID PASID ADDRESS COUNT", DeviceReads},
    {"vtd-page-queue RING", SetPageQueue},
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
