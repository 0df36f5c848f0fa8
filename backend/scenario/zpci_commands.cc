// An s390 PCI function: the guest writes its DMA tables, registers them with MPCIFC, and says with
// RPCIT what it changed. Behind it a device with a container and an IOMMU of its own.

#include <fmt/format.h>

#include <memory>
#include <string>

#include "apionly-domain/assigned/assigned_domain.h"
#include "apionly-domain/nested/container_target.h"
#include "apionly-domain/nested/zpci_function.h"
#include "backend/scenario/commands.h"
#include "backend/scenario/device_iommu.h"
#include "backend/scenario/table_builder.h"

namespace mvgpu::backend::scenario {

namespace {

namespace zpci = domain::zpci;

class Zpci final : public World::Part, private domain::ZpciFunction::Owner {
 public:
  static constexpr World::Slot kSlot = World::Slot::kZpci;
  static constexpr std::string_view kMaker = "zpci-function HANDLE ID CREDITS";
  struct Numbers {
    uint32_t handle;
    uint32_t id;
    uint64_t credits;
  };

  static Result<std::unique_ptr<Zpci>> Create(Guest* guest, Numbers numbers) {
    std::unique_ptr<Zpci> made(new Zpci(guest, numbers));
    MVGPU_ASSIGN_OR_RETURN(made->assigned_,
                           domain::AssignedDomain::Create({}, &made->iommu_.space(), nullptr));
    MVGPU_RETURN_IF_ERROR(made->container_.attach(made->assigned_.get()));
    made->function_ = std::make_unique<domain::ZpciFunction>(
        domain::ZpciFunction::Options{.handle = numbers.handle, .id = numbers.id},
        domain::ZpciFunction::Parts{&guest->domain(), &made->target_, &made->credits_, made.get()});
    return made;
  }
  ~Zpci() override {
    function_.reset();
    if (assigned_ != nullptr) static_cast<void>(container_.detach(assigned_.get()));
  }

  uint64_t r1() const { return uint64_t{handle_} << 32; }
  domain::ZpciFunction& function() { return *function_; }
  domain::Container& container() { return container_; }
  DeviceIommu& iommu() { return iommu_; }
  uint64_t credits() const { return credits_.available(); }
  uint64_t events() const { return events_; }
  const zpci::ErrorEvent& last_event() const { return last_event_; }
  domain::NestedDomain::Counters shadow() const {
    const domain::NestedDomain* const nested = function_->domain();
    return nested == nullptr ? domain::NestedDomain::Counters{} : nested->counters();
  }

  // The guest's tables: a region-third table at `origin`, the others behind it.
  Result<void> begin_tables(uint64_t origin) {
    tables_.set_next(origin);
    MVGPU_ASSIGN_OR_RETURN(root_, MakeUpper());
    return {};
  }
  // Where the entry of an IOVA's page is.
  Result<uint64_t> page_entry(uint64_t iova) {
    MVGPU_ASSIGN_OR_RETURN(const uint64_t segments, Below(root_ + (iova >> 31 & 2047) * 8, true));
    MVGPU_ASSIGN_OR_RETURN(const uint64_t pages, Below(segments + (iova >> 20 & 2047) * 8, false));
    return pages + (iova >> kPageShift & 255) * 8;
  }
  Result<void> put(uint64_t place, uint64_t entry) {
    return guest_.store64(place, __builtin_bswap64(entry));
  }

 private:
  Zpci(Guest* guest, Numbers numbers)
      : guest_(*guest),
        handle_(numbers.handle),
        tables_(guest),
        target_(&guest->domain(), &container_),
        credits_(numbers.credits) {}

  void on_error_event(const zpci::ErrorEvent& event) override {
    ++events_;
    last_event_ = event;
  }
  Result<uint64_t> MakeUpper() {
    return tables_.make_table(2048, __builtin_bswap64(zpci::kTableInvalid));
  }
  // The table that an entry leads to; made if there is none.
  Result<uint64_t> Below(uint64_t place, bool is_region) {
    MVGPU_ASSIGN_OR_RETURN(const uint64_t raw, guest_.load64(place));
    const uint64_t entry = __builtin_bswap64(raw);
    if ((entry & zpci::kTableInvalid) == 0) {
      return entry & (is_region ? zpci::kRegionOrigin : zpci::kSegmentOrigin);
    }
    MVGPU_ASSIGN_OR_RETURN(
        const uint64_t made,
        is_region ? MakeUpper() : tables_.make_table(256, __builtin_bswap64(zpci::kPageInvalid)));
    MVGPU_RETURN_IF_ERROR(put(place, made | (is_region ? 0x7 : 0)));
    return made;
  }

  Guest& guest_;
  const uint32_t handle_;
  TableBuilder tables_;
  uint64_t root_ = 0;
  DeviceIommu iommu_;
  domain::Container container_;
  std::unique_ptr<domain::AssignedDomain> assigned_;
  domain::ContainerTarget target_;
  domain::MapCredits credits_;
  uint64_t events_ = 0;
  zpci::ErrorEvent last_event_;
  std::unique_ptr<domain::ZpciFunction> function_;
};

std::string ToText(const zpci::Outcome& outcome, uint64_t r1) {
  using Exception = zpci::Outcome::Exception;
  if (outcome.exception == Exception::kOperand) return "operand exception";
  if (outcome.exception == Exception::kSpecification) return "specification exception";
  std::string text = fmt::format("cc {}", static_cast<int>(outcome.condition));
  if (outcome.condition == zpci::Condition::kError) {
    text += fmt::format(" status {} r1 {:#x}", static_cast<int>(outcome.status), outcome.r1(r1));
  }
  return text;
}

Result<std::string> MakeFunction(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Guest* const guest, world.guest());
  const auto& numbers = arguments.numbers;
  MVGPU_RETURN_IF_ERROR(CheckBounds("handle", numbers[0], 0, UINT32_MAX));
  MVGPU_RETURN_IF_ERROR(CheckBounds("id", numbers[1], 0, UINT32_MAX));
  MVGPU_ASSIGN_OR_RETURN(auto made,
                         Zpci::Create(guest, {static_cast<uint32_t>(numbers[0]),
                                              static_cast<uint32_t>(numbers[1]), numbers[2]}));
  MVGPU_RETURN_IF_ERROR(world.add(std::move(made)));
  return std::string("enabled");
}

Result<std::string> BeginTables(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Zpci* const zpci, world.part<Zpci>());
  MVGPU_RETURN_IF_ERROR(zpci->begin_tables(arguments.numbers[0]));
  return std::string("empty");
}

Result<std::string> GuestMaps(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Zpci* const zpci, world.part<Zpci>());
  MVGPU_ASSIGN_OR_RETURN(const uint64_t place, zpci->page_entry(arguments.numbers[0]));
  const uint64_t protect = arguments.words[0] == "r" ? zpci::kProtect : 0;
  MVGPU_RETURN_IF_ERROR(zpci->put(place, (arguments.numbers[1] & zpci::kPageFrame) | protect));
  return fmt::format("entry at {:#x}", place);
}

Result<std::string> GuestUnmaps(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Zpci* const zpci, world.part<Zpci>());
  MVGPU_ASSIGN_OR_RETURN(const uint64_t place, zpci->page_entry(arguments.numbers[0]));
  MVGPU_RETURN_IF_ERROR(zpci->put(place, zpci::kPageInvalid));
  return fmt::format("entry at {:#x}", place);
}

Result<std::string> Control(World& world, uint8_t control, const zpci::Fib& fib) {
  MVGPU_ASSIGN_OR_RETURN(Zpci* const zpci, world.part<Zpci>());
  const uint64_t r1 = zpci->r1() | control;
  return ToText(zpci->function().modify_controls(r1, fib), r1);
}
Result<std::string> Register(World& world, const Arguments& arguments) {
  const auto& numbers = arguments.numbers;
  return Control(world, arguments.words[0] == "register" ? 4 : 6,
                 {0, numbers[0], numbers[1], numbers[2]});
}
Result<std::string> Deregister(World& world, const Arguments&) { return Control(world, 5, {}); }
Result<std::string> Reset(World& world, const Arguments& arguments) {
  return Control(world, arguments.words[0] == "reset-error" ? 7 : 9, {});
}

Result<std::string> Rpcit(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Zpci* const zpci, world.part<Zpci>());
  const zpci::RefreshOperands operands{zpci->r1(), 2, arguments.numbers[0], arguments.numbers[1]};
  return ToText(zpci->function().refresh(operands), operands.r1);
}

Result<std::string> Dma(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Zpci* const zpci, world.part<Zpci>());
  const auto reached =
      zpci->function().dma(Iova(arguments.numbers[0]), AccessOfWord(arguments.words[0]));
  if (!reached) return fmt::format("event {}", static_cast<unsigned>(reached.error()));
  return fmt::format("{:#x}", reached->value());
}

Result<std::string> DeviceReads(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Zpci* const zpci, world.part<Zpci>());
  return zpci->iommu().bytes(arguments.numbers[0], arguments.numbers[1]);
}

Result<std::string> Figure(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Zpci* const zpci, world.part<Zpci>());
  const std::string& which = arguments.words[0];
  const auto shadow = zpci->shadow();
  if (which == "mapped") return fmt::format("{}", shadow.mapped_pages);
  if (which == "maps") return fmt::format("{}", shadow.maps);
  if (which == "unmaps") return fmt::format("{}", shadow.unmaps);
  if (which == "revoked") return fmt::format("{}", shadow.revoked_pages);
  if (which == "credits") return fmt::format("{}", zpci->credits());
  if (which == "vfio-mappings") return fmt::format("{}", zpci->container().totals().mappings);
  return fmt::format("{}", zpci->events());
}

Result<std::string> State(World& world, const Arguments&) {
  MVGPU_ASSIGN_OR_RETURN(Zpci* const zpci, world.part<Zpci>());
  using State = domain::ZpciFunction::State;
  switch (zpci->function().state()) {
    case State::kReserved:
      return std::string("reserved");
    case State::kDisabled:
      return std::string("disabled");
    case State::kStandby:
      return std::string("standby");
    case State::kEnabled:
      return std::string("enabled");
    case State::kBlocked:
      return std::string("blocked");
    case State::kError:
      return std::string("error");
    case State::kPermanentError:
      break;
  }
  return std::string("permanent-error");
}

Result<std::string> LastEvent(World& world, const Arguments&) {
  MVGPU_ASSIGN_OR_RETURN(Zpci* const zpci, world.part<Zpci>());
  if (zpci->events() == 0) return std::string("none");
  const zpci::ErrorEvent& event = zpci->last_event();
  return fmt::format("handle {:#x} id {} code {} address {:#x}", event.handle, event.id,
                     static_cast<unsigned>(event.code), event.address);
}

constexpr Command kCommands[] = {
    {Zpci::kMaker, MakeFunction},
    {"zpci-tables ORIGIN", BeginTables},
    {"zpci-map IOVA FRAME r|rw", GuestMaps},
    {"zpci-unmap IOVA", GuestUnmaps},
    {"mpcifc register|reregister PBA PAL IOTA", Register},
    {"mpcifc deregister", Deregister},
    {"mpcifc reset-error|reset-block", Reset},
    {"rpcit START LENGTH", Rpcit},
    {"zpci-dma IOVA r|w|rw", Dma},
    {"zpci-bytes IOVA COUNT", DeviceReads},
    {"zpci mapped|maps|unmaps|revoked|credits|vfio-mappings|events", Figure},
    {"zpci-state", State},
    {"zpci-event", LastEvent},
};

}  // namespace

std::span<const Command> ZpciCommands() { return kCommands; }

}  // namespace mvgpu::backend::scenario
