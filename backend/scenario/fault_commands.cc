// I/O page faults: a device that may fault, the ways in which it says so (VT-d's page requests,
// SMMUv3's stalls), a host that pins and maps by fault, and a guest that answers what is its own.
//
//   page-request --> host's ring --> handler --+
//   stall -------> event record --> handler ---+--> queue --> router --> memory on demand
//                                                               |  ^
//                                              guest's ring <---+  +--- guest-answers

#include <fcntl.h>
#include <fmt/format.h>

#include <cerrno>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "apionly-domain/faults/fault_router.h"
#include "apionly-domain/faults/smmu_entries.h"
#include "apionly-domain/faults/smmu_stalls.h"
#include "apionly-domain/faults/vtd_page_requests.h"
#include "apionly-domain/nested/vtd_first_stage.h"
#include "backend/scenario/commands.h"
#include "backend/scenario/device_iommu.h"

namespace mvgpu::backend::scenario {

namespace {

using domain::FaultAnswer;
using domain::FaultGroup;
using domain::FaultingDomain;
using domain::FaultRouter;

std::string_view WordOf(FaultAnswer answer) {
  if (answer == FaultAnswer::kSuccess) return "success";
  return answer == FaultAnswer::kInvalid ? "invalid" : "failure";
}

FaultAnswer AnswerOfWord(std::string_view word) {
  if (word == "success") return FaultAnswer::kSuccess;
  return word == "invalid" ? FaultAnswer::kInvalid : FaultAnswer::kFailure;
}

class Faults final : public World::Part,
                     private domain::FaultSource,
                     private FaultRouter::Spaces,
                     private domain::SmmuStalls::Port {
 public:
  static constexpr World::Slot kSlot = World::Slot::kFaults;
  static constexpr std::string_view kMaker = "iopf AROUND LIMIT host-ring RING guest-ring RING";
  struct Numbers {
    uint64_t around;
    uint64_t limit;  // pages
    uint64_t host_ring;
    uint64_t guest_ring;
  };

  static Result<std::unique_ptr<Faults>> Create(Guest* guest, Numbers numbers) {
    std::unique_ptr<Faults> made(new Faults(guest, numbers));
    MVGPU_ASSIGN_OR_RETURN(made->queue_, domain::FaultQueue::Create({}, nullptr));
    MVGPU_RETURN_IF_ERROR(guest->container().attach(&made->memory_));
    made->is_attached_ = true;
    made->router_.emplace(
        FaultRouter::Parts{made->queue_.get(), &made->memory_, made.get(), &made->guest_ring_});
    made->pages_.emplace(&guest->domain(), &made->host_ring_, made->queue_.get(),
                         domain::VtdPageRequestHandler::Options{});
    made->stall_handler_.emplace(&made->stalls_, made->queue_.get());
    return made;
  }
  ~Faults() override {
    hole_.reset();
    guest_ring_.drop_all();
    if (queue_ != nullptr) queue_->close();
    if (is_attached_) static_cast<void>(guest_.container().detach(&memory_));
  }

  FaultingDomain& memory() { return memory_; }
  DeviceIommu& iommu() { return iommu_; }
  domain::VtdPageRequestQueue& host_ring() { return host_ring_; }
  domain::VtdPageRequestQueue& guest_ring() { return guest_ring_; }
  FaultRouter& router() { return *router_; }
  const domain::SmmuEvent::Words& last_event() const { return last_event_; }

  Result<void> ask(FaultGroup group) { return host_ring_.submit(std::move(group), this); }
  Result<void> stall(FaultGroup group) { return stalls_.submit(std::move(group), this); }
  void set_stream(uint32_t stream, uint64_t entry) {
    if (streams_.size() < kMostAnswers) streams_[stream] = entry;
  }
  // Whether the stream's entry and the substream's descriptor let an access stall that finds no
  // translation in stage 1. Streams without an entry do.
  Result<bool> stalls(const FaultGroup& group) {
    const auto found = streams_.find(group.device);
    if (found == streams_.end()) return true;
    domain::SmmuStreamEntry entry;
    MVGPU_RETURN_IF_ERROR(Load(found->second, entry.words));
    const auto place = entry.descriptor_of(group.pasid.value_or(0));
    if (!entry.is_valid() || !place) return false;
    domain::SmmuContextDescriptor descriptor;
    MVGPU_RETURN_IF_ERROR(Load(*place, descriptor.words));
    return descriptor.is_valid() && descriptor.stalls(entry);
  }
  // What the host does about faults, until it has no more. Returns how many groups.
  Result<uint64_t> handle_all() {
    MVGPU_RETURN_IF_ERROR(pages_->poll());
    uint64_t groups = 0;
    while (router_->handle_one()) ++groups;
    return groups;
  }
  std::string answer_of(uint32_t device, uint32_t id) const {
    const auto found = answers_.find({device, id});
    return found == answers_.end() ? "none" : found->second;
  }
  void set_stage_one(uint32_t device, uint32_t pasid, uint64_t root) {
    if (roots_.size() < kMostAnswers) roots_[{device, pasid}] = root;
  }

  // The guest gives memory back: while the hole is there nothing of it may be mapped.
  Result<uint64_t> begin_hole(IovaRange range) {
    if (hole_ != nullptr) return Fail(ErrorCode::kBusy, "'give-back end' comes first");
    hole_range_ = range;
    hole_.reset(new FaultingDomain::Invalidation(memory_.begin_invalidate(range)));
    return hole_->pages();
  }
  // IOVAs are places in RAM here.
  Result<void> end_hole() {
    if (hole_ == nullptr) return Fail(ErrorCode::kNotMapped, "'give-back begin' comes first");
    const IovaRange range = *hole_range_;
    MVGPU_RETURN_IF_ERROR(guest_.at(range.start().value(), range.size()));
    if (fallocate(guest_.memory_fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                  static_cast<off_t>(range.start().value()),
                  static_cast<off_t>(range.size())) != 0) {
      return FailSystem(errno, "cannot give guest memory back");
    }
    hole_.reset();
    return {};
  }

 private:
  static constexpr size_t kMostAnswers = 4096;

  Faults(Guest* guest, Numbers numbers)
      : guest_(*guest),
        iommu_({.maps_each_page = true}),
        target_(&iommu_.space()),
        memory_({.around_pages = numbers.around, .max_pinned_pages = numbers.limit},
                {&guest->domain(), &target_, nullptr}),
        host_ring_(&guest->domain(), nullptr),
        guest_ring_(&guest->domain(), nullptr),
        stalls_(this),
        tables_(&guest->domain()),
        walker_({}, &tables_) {
    host_ring_.set_address(numbers.host_ring);
    guest_ring_.set_address(numbers.guest_ring);
  }

  Result<void> Load(uint64_t place, std::span<uint64_t> words) {
    for (size_t i = 0; i < words.size(); ++i) {
      MVGPU_ASSIGN_OR_RETURN(words[i], guest_.load64(place + i * sizeof(uint64_t)));
    }
    return {};
  }
  void on_answer(const FaultGroup& group, FaultAnswer answer) override {
    if (answers_.size() == kMostAnswers) return;
    std::string& told = answers_[{group.device, group.id}];
    told += (told.empty() ? "" : " and ") + std::string(WordOf(answer));
  }
  std::optional<FaultRouter::StageOne> stage_one(uint32_t device,
                                                 std::optional<uint32_t> pasid) const override {
    const auto found = roots_.find({device, pasid.value_or(UINT32_MAX)});
    if (found == roots_.end()) return std::nullopt;
    return FaultRouter::StageOne{&walker_, found->second};
  }
  Result<void> on_event(const domain::SmmuEvent::Words& words) override {
    last_event_ = words;
    stall_handler_->handle(words);
    return {};
  }

  Guest& guest_;
  DeviceIommu iommu_;
  domain::SpaceTarget target_;
  FaultingDomain memory_;
  std::optional<IovaRange> hole_range_;
  std::unique_ptr<FaultingDomain::Invalidation> hole_;
  bool is_attached_ = false;
  std::map<std::pair<uint32_t, uint32_t>, std::string> answers_;  // by device and group
  std::map<std::pair<uint32_t, uint32_t>, uint64_t> roots_;       // by device and PASID
  std::map<uint32_t, uint64_t> streams_;                          // where their entries are
  domain::SmmuEvent::Words last_event_{};
  domain::VtdPageRequestQueue host_ring_;
  domain::VtdPageRequestQueue guest_ring_;
  domain::SmmuStalls stalls_;
  domain::DomainTables tables_;
  domain::VtdFirstStage walker_;
  std::unique_ptr<domain::FaultQueue> queue_;
  // They answer what the queue has: closed before they go.
  std::optional<domain::SmmuStallHandler> stall_handler_;
  std::optional<domain::VtdPageRequestHandler> pages_;
  std::optional<FaultRouter> router_;
};

Result<uint32_t> Bounded(std::string_view what, uint64_t value, uint32_t high) {
  MVGPU_RETURN_IF_ERROR(CheckBounds(what, value, 0, high));
  return static_cast<uint32_t>(value);
}

Result<std::string> MakeFaults(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Guest* const guest, world.guest());
  const auto& numbers = arguments.numbers;
  MVGPU_RETURN_IF_ERROR(CheckBounds("around", numbers[0], 1, FaultingDomain::kBlockPages));
  if ((numbers[0] & (numbers[0] - 1)) != 0) {
    return Fail(ErrorCode::kInvalid, fmt::format("around {} is no power of two", numbers[0]));
  }
  MVGPU_RETURN_IF_ERROR(CheckBounds("limit", numbers[1], 1, UINT64_MAX));
  MVGPU_ASSIGN_OR_RETURN(auto made,
                         Faults::Create(guest, {numbers[0], numbers[1], numbers[2], numbers[3]}));
  MVGPU_RETURN_IF_ERROR(world.add(std::move(made)));
  return std::string("nothing is pinned");
}

Result<FaultGroup> GroupFrom(uint64_t device, uint64_t pasid, uint64_t id) {
  FaultGroup group;
  MVGPU_ASSIGN_OR_RETURN(group.device, Bounded("device", device, UINT32_MAX));
  MVGPU_ASSIGN_OR_RETURN(group.pasid, Bounded("PASID", pasid, 0xf'ffff));
  MVGPU_ASSIGN_OR_RETURN(group.id, Bounded("group", id, UINT16_MAX));
  return group;
}

Result<std::string> RequestPages(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Faults* const faults, world.part<Faults>());
  const auto& numbers = arguments.numbers;
  MVGPU_ASSIGN_OR_RETURN(FaultGroup group, GroupFrom(numbers[0], numbers[1], numbers[2]));
  const auto rights = static_cast<domain::FaultRights>(AccessOfWord(arguments.words[0]));
  for (size_t i = 3; i < numbers.size(); ++i) group.requests.push_back({rights, numbers[i]});
  MVGPU_RETURN_IF_ERROR(faults->ask(std::move(group)));
  return fmt::format("{} entries", numbers.size() - 3);
}

Result<std::string> Stall(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Faults* const faults, world.part<Faults>());
  const auto& numbers = arguments.numbers;
  MVGPU_ASSIGN_OR_RETURN(FaultGroup group, GroupFrom(numbers[0], numbers[1], numbers[2]));
  const auto rights = static_cast<domain::FaultRights>(AccessOfWord(arguments.words[0]));
  group.requests.push_back({rights, numbers[3], /*stage=*/1});
  MVGPU_ASSIGN_OR_RETURN(const bool stalls, faults->stalls(group));
  if (!stalls) return std::string("terminated");
  MVGPU_RETURN_IF_ERROR(faults->stall(std::move(group)));
  const auto& words = faults->last_event();
  return fmt::format("event {:#x} {:#x} {:#x}", words[0], words[1], words[2]);
}

Result<std::string> SetStream(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Faults* const faults, world.part<Faults>());
  MVGPU_ASSIGN_OR_RETURN(const uint32_t stream,
                         Bounded("stream", arguments.numbers[0], UINT32_MAX));
  faults->set_stream(stream, arguments.numbers[1]);
  return std::string("done");
}

Result<std::string> HandleFaults(World& world, const Arguments&) {
  MVGPU_ASSIGN_OR_RETURN(Faults* const faults, world.part<Faults>());
  MVGPU_ASSIGN_OR_RETURN(const uint64_t groups, faults->handle_all());
  return fmt::format("{} groups", groups);
}

Result<std::string> AnswerOf(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Faults* const faults, world.part<Faults>());
  MVGPU_ASSIGN_OR_RETURN(const uint32_t device,
                         Bounded("device", arguments.numbers[0], UINT32_MAX));
  MVGPU_ASSIGN_OR_RETURN(const uint32_t id, Bounded("group", arguments.numbers[1], UINT16_MAX));
  return faults->answer_of(device, id);
}

Result<std::string> SetStageOne(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Faults* const faults, world.part<Faults>());
  const auto& numbers = arguments.numbers;
  MVGPU_ASSIGN_OR_RETURN(const FaultGroup group, GroupFrom(numbers[0], numbers[1], 0));
  faults->set_stage_one(group.device, *group.pasid, numbers[2]);
  return std::string("done");
}

// The guest's driver takes one entry off its ring.
Result<std::string> GuestSees(World& world, const Arguments&) {
  MVGPU_ASSIGN_OR_RETURN(Faults* const faults, world.part<Faults>());
  MVGPU_ASSIGN_OR_RETURN(Guest* const guest, world.guest());
  auto& ring = faults->guest_ring();
  if (ring.head() == ring.tail()) return std::string("nothing");
  domain::VtdPageRequest::Words words{};
  const uint64_t place = (ring.address() & ~kPageMask) + ring.head();
  for (size_t i = 0; i < words.size(); ++i) {
    MVGPU_ASSIGN_OR_RETURN(words[i], guest->load64(place + i * sizeof(uint64_t)));
  }
  MVGPU_ASSIGN_OR_RETURN(const auto seen, domain::VtdPageRequest::Decode(words));
  ring.set_head((ring.head() + domain::VtdPageRequest::kBytes) %
                (kPageSize << (ring.address() & 7)));
  ring.clear_status(domain::VtdPageRequestQueue::kPending);
  const auto access = static_cast<domain::Access>((seen.reads ? 1 : 0) | (seen.writes ? 2 : 0));
  return fmt::format("{:#x}/{:#x} group {} {} {:#x}", seen.requester, seen.pasid.value_or(0),
                     seen.group, WordOfAccess(access), seen.address);
}

Result<std::string> GuestAnswers(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Faults* const faults, world.part<Faults>());
  const auto& numbers = arguments.numbers;
  domain::VtdGroupResponse response;
  MVGPU_RETURN_IF_ERROR(CheckBounds("requester", numbers[0], 0, UINT16_MAX));
  MVGPU_RETURN_IF_ERROR(CheckBounds("group", numbers[2], 0, 511));
  response.requester = static_cast<uint16_t>(numbers[0]);
  MVGPU_ASSIGN_OR_RETURN(response.pasid, Bounded("PASID", numbers[1], 0xf'ffff));
  response.group = static_cast<uint16_t>(numbers[2]);
  response.answer = AnswerOfWord(arguments.words[0]);
  MVGPU_RETURN_IF_ERROR(faults->guest_ring().respond(response.encode()));
  return std::string("carried to the device");
}

Result<std::string> BeginGiveBack(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Faults* const faults, world.part<Faults>());
  MVGPU_ASSIGN_OR_RETURN(const IovaRange range,
                         RangeFrom(arguments.numbers[0], arguments.numbers[1]));
  MVGPU_ASSIGN_OR_RETURN(const uint64_t pages, faults->begin_hole(range));
  return fmt::format("{} unpinned", pages);
}

Result<std::string> EndGiveBack(World& world, const Arguments&) {
  MVGPU_ASSIGN_OR_RETURN(Faults* const faults, world.part<Faults>());
  MVGPU_RETURN_IF_ERROR(faults->end_hole());
  return std::string("punched");
}

Result<std::string> DropUnused(World& world, const Arguments&) {
  MVGPU_ASSIGN_OR_RETURN(Faults* const faults, world.part<Faults>());
  return fmt::format("{} unpinned", faults->memory().drop_unused());
}

Result<std::string> DeviceReads(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Faults* const faults, world.part<Faults>());
  return faults->iommu().bytes(arguments.numbers[0], arguments.numbers[1]);
}

Result<std::string> Figure(World& world, const Arguments& arguments) {
  MVGPU_ASSIGN_OR_RETURN(Faults* const faults, world.part<Faults>());
  const std::string& which = arguments.words[0];
  const auto memory = faults->memory().counters();
  const auto routed = faults->router().counters();
  if (which == "mapped") return fmt::format("{}", memory.mapped_pages);
  if (which == "peak") return fmt::format("{}", memory.peak_pinned_pages);
  if (which == "faults") return fmt::format("{}", memory.faults);
  if (which == "retries") return fmt::format("{}", memory.retries);
  if (which == "evicted") return fmt::format("{}", memory.evicted_pages);
  if (which == "given-back") return fmt::format("{}", memory.invalidated_pages);
  if (which == "resolved") return fmt::format("{}", routed.resolved);
  if (which == "forwarded") return fmt::format("{}", routed.forwarded);
  return fmt::format("{}", routed.invalid);
}

constexpr Command kCommands[] = {
    {Faults::kMaker, MakeFaults},
    {"page-request RID PASID GROUP r|w|rw ADDRESS...", RequestPages},
    {"stall STREAM SUBSTREAM NUMBER r|w|rw ADDRESS", Stall},
    {"smmu-stream STREAM ENTRY", SetStream},
    {"handle-faults", HandleFaults},
    {"answer-to DEVICE GROUP", AnswerOf},
    {"guest-stage-one RID PASID ROOT", SetStageOne},
    {"guest-sees", GuestSees},
    {"guest-answers RID PASID GROUP success|invalid|failure", GuestAnswers},
    {"give-back begin IOVA SIZE", BeginGiveBack},
    {"give-back end", EndGiveBack},
    {"drop-unused", DropUnused},
    {"iopf-bytes IOVA COUNT", DeviceReads},
    {"iopf-figure mapped|peak|faults|retries|evicted|given-back|resolved|forwarded|invalid",
     Figure},
};

}  // namespace

std::span<const Command> FaultCommands() { return kCommands; }

}  // namespace mvgpu::backend::scenario
