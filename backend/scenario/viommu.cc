#include "backend/scenario/viommu.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <utility>
#include <variant>

namespace mvgpu::backend::scenario {

namespace {

using domain::DeviceSpace;

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

std::string TakeJoined(std::vector<std::string>* texts) {
  std::string text = texts->empty() ? "nothing" : fmt::format("{}", fmt::join(*texts, " then "));
  texts->clear();
  return text;
}

}  // namespace

void IommuHearing::on_iommu_event(const domain::IommuEvent& event) {
  if (heard_.size() == kMost) return;
  heard_.push_back(ToText(event.space) + " " + std::visit(Describe(), event.what));
}

std::string IommuHearing::take() { return TakeJoined(&heard_); }

Viommu::Viommu(Guest* guest, domain::SourceId source)
    : guest_(*guest),
      tables_(guest),
      own_(std::make_unique<GuestIommu>(GuestIommu::Options{.space = {source}}, &guest->domain())),
      access_([this](const Doing& doing) { doing(*own_); }) {
  Begin();
}

Viommu::Viommu(Guest* guest, Access access)
    : guest_(*guest), tables_(guest), access_(std::move(access)) {
  Begin();
}

void Viommu::Begin() {
  use([](GuestIommu& iommu) { iommu.unit().faults().set_masked(false); });
}

Viommu::~Viommu() {
  use([this](GuestIommu& iommu) {
    for (auto& [name, listener] : listeners_) iommu.object().remove(&listener);
    iommu.unit().page_requests().drop_all();
  });
}

Result<void> Viommu::listen(const std::string& name, const domain::IommuObject::Filter& filter) {
  if (listeners_.contains(name) || listeners_.size() == kMostListeners) {
    return Fail(ErrorCode::kOverlap, fmt::format("no room for a listener '{}'", name));
  }
  use([&](GuestIommu& iommu) { iommu.object().add(&listeners_[name], filter); });
  return {};
}

Result<void> Viommu::unlisten(const std::string& name) {
  MVGPU_ASSIGN_OR_RETURN(IommuHearing* const there, listener(name));
  use([&](GuestIommu& iommu) { iommu.object().remove(there); });
  listeners_.erase(name);
  return {};
}

Result<IommuHearing*> Viommu::listener(const std::string& name) {
  const auto found = listeners_.find(name);
  if (found != listeners_.end()) return &found->second;
  return Fail(ErrorCode::kNotMapped, fmt::format("there is no listener '{}'", name));
}

void Viommu::begin_queue(uint64_t ring) {
  ring_ = ring & ~kPageMask;
  tail_ = 0;
  use([this](GuestIommu& iommu) {
    iommu.unit().queue().disable();
    iommu.unit().queue().write_address(ring_ | uint64_t{1} << 11);
    iommu.unit().queue().enable();
  });
}

Result<void> Viommu::post(uint64_t low, uint64_t high) {
  for (const uint64_t word : {low, high, uint64_t{0}, uint64_t{0}}) {
    MVGPU_RETURN_IF_ERROR(guest_.store64(ring_ + tail_, word));
    tail_ = (tail_ + sizeof(word)) % kPageSize;
  }
  return {};
}

void Viommu::run_queue(uint64_t most) {
  use([&](GuestIommu& iommu) {
    iommu.unit().queue().write_tail(tail_);
    iommu.unit().run_queue(most);
  });
}

Result<void> Viommu::request_pages(domain::FaultGroup group) {
  return ask([&](GuestIommu& iommu) -> Result<void> {
    return iommu.unit().submit(std::move(group), this);
  });
}

void Viommu::on_answer(const domain::FaultGroup& group, domain::FaultAnswer answer) {
  answers_.push_back(fmt::format("group {:#x} code {}", group.id, static_cast<unsigned>(answer)));
}

std::string Viommu::take_answers() { return TakeJoined(&answers_); }

}  // namespace mvgpu::backend::scenario
