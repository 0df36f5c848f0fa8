// Guest memory as the VMM maps it and the guest writes it, pins, and the accounts.

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <string>

#include "apionly-domain/pin/pin_context.h"
#include "backend/scenario/commands.h"
#include "backend/scenario/world.h"

namespace mvgpu::backend::scenario {

namespace {

// Who pins by name. What the VMM takes away it lets go of.
class Pins final : public World::Part, public domain::PinOwner {
 public:
  static constexpr World::Slot kSlot = World::Slot::kPins;
  static constexpr std::string_view kMaker = "pin";

  explicit Pins(domain::ApiOnlyDomain* domain) : context_(domain->open_context(this)) {}

  Result<void> pin(const std::string& name, IovaRange range, domain::Access access) {
    if (pins_.contains(name)) {
      return Fail(ErrorCode::kOverlap, fmt::format("the pin '{}' is there: release it", name));
    }
    MVGPU_ASSIGN_OR_RETURN(auto pinned, context_->pin(range, access));
    pins_.emplace(name, std::move(pinned));
    return {};
  }
  Result<void> release(const std::string& name) {
    if (pins_.erase(name) == 1) return {};
    return Fail(ErrorCode::kNotMapped, fmt::format("there is no pin '{}'", name));
  }

  std::string_view pin_owner_name() const override { return "scenario"; }
  void on_revoke(IovaRange range) override {
    std::erase_if(pins_, [&](const auto& pin) {
      const auto runs = pin.second.runs();
      return std::any_of(runs.begin(), runs.end(),
                         [&](const auto& run) { return run.iova.overlaps(range); });
    });
  }

 private:
  const std::unique_ptr<domain::PinContext> context_;
  std::map<std::string, domain::PinnedRange> pins_;  // released before the context goes
};

Result<std::string> MakeMemory(World& world, const Arguments& arguments) {
  MVGPU_RETURN_IF_ERROR(world.make_memory(arguments.numbers[0]));
  return fmt::format("{} pages", PagesIn(arguments.numbers[0]));
}

Result<std::string> Map(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Guest* const guest, world.guest());
  domain::Container::MapRequest request;
  request.iova = Iova(arguments.numbers[0]);
  request.size = arguments.numbers[1];
  request.access = AccessOfWord(arguments.words[0]);
  request.fd.reset(dup(guest->memory_fd()));
  request.file_offset = arguments.numbers[2];
  MVGPU_RETURN_IF_ERROR(guest->container().map(std::move(request)));
  return fmt::format("{} pages", PagesIn(arguments.numbers[1]));
}

Result<std::string> Unmap(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Guest* const guest, world.guest());
  MVGPU_ASSIGN_OR_RETURN(const uint64_t bytes, guest->container().unmap(Iova(arguments.numbers[0]),
                                                                        arguments.numbers[1]));
  return fmt::format("{} pages", PagesIn(bytes));
}

Result<std::string> Write64(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Guest* const guest, world.guest());
  for (size_t i = 1; i < arguments.numbers.size(); ++i) {
    MVGPU_RETURN_IF_ERROR(
        guest->store64(arguments.numbers[0] + (i - 1) * sizeof(uint64_t), arguments.numbers[i]));
  }
  return fmt::format("{} words", arguments.numbers.size() - 1);
}

Result<std::string> Write64BigEndian(World& world, const Arguments& arguments) {
  Arguments swapped = arguments;
  for (size_t i = 1; i < swapped.numbers.size(); ++i) {
    swapped.numbers[i] = __builtin_bswap64(swapped.numbers[i]);
  }
  return Write64(world, swapped);
}

Result<std::string> WriteText(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Guest* const guest, world.guest());
  const std::string& text = arguments.words[0];
  MVGPU_ASSIGN_OR_RETURN(std::byte* const place, guest->at(arguments.numbers[0], text.size()));
  std::memcpy(place, text.data(), text.size());
  return fmt::format("{} bytes", text.size());
}

Result<std::string> Read64(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Guest* const guest, world.guest());
  MVGPU_ASSIGN_OR_RETURN(const uint64_t word, guest->load64(arguments.numbers[0]));
  return fmt::format("{:#x}", word);
}

Result<std::string> MemoryBytes(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Guest* const guest, world.guest());
  MVGPU_ASSIGN_OR_RETURN(const std::byte* const place, guest->at(arguments.numbers[0], 1));
  return DeviceBytes(place, arguments.numbers[0] & kPageMask, arguments.numbers[1]);
}

Result<std::string> Pin(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Guest* const guest, world.guest());
  if (!world.has<Pins>()) {
    MVGPU_RETURN_IF_ERROR(world.add(std::make_unique<Pins>(&guest->domain())));
  }
  MVGPU_ASSIGN_OR_RETURN(Pins* const pins, world.part<Pins>());
  MVGPU_ASSIGN_OR_RETURN(const IovaRange range,
                         RangeFrom(arguments.numbers[0], arguments.numbers[1]));
  MVGPU_RETURN_IF_ERROR(pins->pin(arguments.words[0], range, AccessOfWord(arguments.words[1])));
  return fmt::format("{} pages", PagesOf(range).count);
}

Result<std::string> Release(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Pins* const pins, world.part<Pins>());
  MVGPU_RETURN_IF_ERROR(pins->release(arguments.words[0]));
  return std::string("done");
}

using DomainCounters = domain::ApiOnlyDomain::Counters;
template <uint64_t DomainCounters::*kFigure>
Result<std::string> DomainFigure(World& world, const Arguments&) {
  MVGPU_ASSIGN_OR_RETURN(Guest* const guest, world.guest());
  return fmt::format("{}", guest->domain().counters().*kFigure);
}

Result<std::string> Mappings(World& world, const Arguments&) {
  MVGPU_ASSIGN_OR_RETURN(Guest* const guest, world.guest());
  return fmt::format("{}", guest->container().totals().mappings);
}

// Of the ledger, as another process reads it.
Result<std::string> Charged(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Guest* const guest, world.guest());
  MVGPU_ASSIGN_OR_RETURN(const auto accounts, guest->accounts());
  const std::string& whose = arguments.words[0];
  if (whose == "all") return fmt::format("{}", accounts.charged_pages());
  uint64_t pages = 0;
  for (const auto& row : accounts.rows) {
    if (domain::DomainKindName(row.kind) == whose) pages += row.charged_pages;
  }
  return fmt::format("{}", pages);
}

Result<std::string> Held(World& world, const Arguments&) {
  MVGPU_ASSIGN_OR_RETURN(Guest* const guest, world.guest());
  MVGPU_ASSIGN_OR_RETURN(const auto accounts, guest->accounts());
  return fmt::format("{}", accounts.unique_pages);
}

constexpr Command kCommands[] = {
    {"memory SIZE", MakeMemory},
    {"map IOVA SIZE at OFFSET r|w|rw", Map},
    {"unmap IOVA SIZE", Unmap},
    {"mappings", Mappings},
    {"write64 PLACE VALUE...", Write64},
    {"write64be PLACE VALUE...", Write64BigEndian},
    {"write PLACE TEXT", WriteText},
    {"read64 PLACE", Read64},
    {"bytes PLACE COUNT", MemoryBytes},
    {"pin NAME IOVA SIZE r|w|rw", Pin},
    {"release NAME", Release},
    {"pinned", DomainFigure<&DomainCounters::pinned_pages>},
    {"pinned-unique", DomainFigure<&DomainCounters::unique_pages>},
    {"pin-calls", DomainFigure<&DomainCounters::pin_calls>},
    {"charged api-only|assigned|all", Charged},
    {"held", Held},
};

}  // namespace

std::span<const Command> MemoryCommands() { return kCommands; }

}  // namespace mvgpu::backend::scenario
