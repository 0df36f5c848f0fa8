#include "apionly-domain/viommu/iommu_events.h"

#include <type_traits>

namespace mvgpu::domain {

namespace {

template <typename T>
concept HasRange = requires(T event) {
  event.range;
};

}  // namespace

PasidBinding PasidBinding::Of(Pasid pasid, const vtd::PasidEntry& entry) {
  PasidBinding binding{.translation = entry.translation(),
                       .pasid = pasid,
                       .domain = entry.domain(),
                       .takes_supervisors = entry.takes_supervisors(),
                       .write_protects = entry.write_protects()};
  if (entry.has_first_stage()) {
    binding.first_stage = entry.first_stage();
    binding.first_stage_levels = entry.first_stage_levels();
  }
  if (entry.has_second_stage()) {
    binding.second_stage = entry.second_stage();
    binding.second_stage_levels = entry.second_stage_levels();
  }
  return binding;
}

std::optional<IovaRange> IommuEvent::range() const {
  return std::visit(
      [](const auto& event) -> std::optional<IovaRange> {
        if constexpr (HasRange<decltype(event)>) return event.range;
        if constexpr (std::is_same_v<decltype(event), const PageRequestEvent&>) {
          return RangeOf({event.page.page(), 1});
        }
        return std::nullopt;
      },
      what);
}

std::optional<IommuEvent> IommuEvent::clipped(IovaRange to) const {
  const auto whole = range();
  if (!whole) return *this;
  const auto part = whole->intersection(to);
  if (!part) return std::nullopt;
  IommuEvent clipped = *this;
  std::visit(
      [&](auto& event) {
        if constexpr (HasRange<decltype(event)>) event.range = *part;
        if constexpr (std::is_same_v<decltype(event), MapEvent&>) {
          event.out = event.out + (part->start() - whole->start());
        }
      },
      clipped.what);
  return clipped;
}

}  // namespace mvgpu::domain
