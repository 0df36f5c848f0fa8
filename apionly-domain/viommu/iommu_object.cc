#include "apionly-domain/viommu/iommu_object.h"

#include <fmt/format.h>

#include <algorithm>

#include "apionly-domain/base/check.h"

namespace mvgpu::domain {

// While it lives, entries keep their places; then those that were removed go.
class IommuObject::Telling {
 public:
  explicit Telling(IommuObject* object) : object_(*object) { ++object_.telling_; }
  ~Telling() {
    if (--object_.telling_ != 0) return;
    std::erase_if(object_.entries_, [](const Entry& entry) { return entry.listener == nullptr; });
  }
  Telling(const Telling&) = delete;
  Telling& operator=(const Telling&) = delete;

 private:
  IommuObject& object_;
};

IommuObject::~IommuObject() { MVGPU_CHECK(entries_.empty()); }

void IommuObject::RequireNotTelling() const { MVGPU_CHECK(telling_ == 0); }

void IommuObject::add(IommuListener* listener, Filter filter) {
  entries_.push_back({listener, filter});
  Replay(entries_.size() - 1);
}

void IommuObject::remove(IommuListener* listener) {
  const Telling telling(this);
  for (Entry& entry : entries_) {
    if (entry.listener == listener) entry.listener = nullptr;
  }
}

bool IommuObject::is_heard(IommuEventKind kind) const {
  return std::any_of(entries_.begin(), entries_.end(), [&](const Entry& entry) {
    return entry.listener != nullptr && (entry.filter.kinds & static_cast<unsigned>(kind)) != 0;
  });
}

void IommuObject::TellOne(const Entry& entry, const IommuEvent& event) {
  if (entry.listener == nullptr) return;
  const Filter& filter = entry.filter;
  if ((filter.kinds & static_cast<unsigned>(event.kind())) == 0) return;
  if (filter.space && *filter.space != event.space) return;
  if (const auto part = event.clipped(filter.range)) entry.listener->on_iommu_event(*part);
}

// Callbacks may add entries, which moves them; those that are added have heard of it by replay.
void IommuObject::Tell(const IommuEvent& event) {
  const Telling telling(this);
  const size_t count = entries_.size();
  for (size_t i = 0; i < count; ++i) {
    const Entry entry = entries_[i];
    TellOne(entry, event);
  }
}

void IommuObject::Replay(size_t index) {
  const Telling telling(this);
  for (const auto& [space, binding] : bindings_) {
    const Entry entry = entries_[index];
    TellOne(entry, {space, BindPasidEvent{binding}});
  }
  for (const auto& [place, mapping] : mappings_) {
    const Entry entry = entries_[index];
    TellOne(entry, {place.space, mapping});
  }
}

bool IommuObject::IsMapped(DeviceSpace space, IovaRange range) const {
  auto next = mappings_.lower_bound({space, range.start()});
  if (next != mappings_.end() && next->first.space == space && next->second.range.overlaps(range)) {
    return true;
  }
  if (next == mappings_.begin()) return false;
  --next;
  return next->first.space == space && next->second.range.overlaps(range);
}

Result<void> IommuObject::map(DeviceSpace space, const MapEvent& mapping) {
  RequireNotTelling();
  const IovaRange& range = mapping.range;
  const uint64_t last_offset = range.last() - range.start();
  if (!range.is_page_aligned() || !mapping.out.is_page_aligned() ||
      !CheckedAdd(mapping.out.value(), last_offset)) {
    return Fail(
        ErrorCode::kInvalid,
        fmt::format("mapping {:#x}-{:#x} to {:#x} is not whole pages; align all to {} bytes",
                    range.start().value(), range.last().value(), mapping.out.value(), kPageSize));
  }
  if (IsMapped(space, range)) {
    return Fail(ErrorCode::kOverlap,
                fmt::format("something is mapped in {:#x}-{:#x} of device {:#x}; unmap it first",
                            range.start().value(), range.last().value(), space.source));
  }
  if (mappings_.size() >= limits_.mappings) {
    return Fail(ErrorCode::kLimit,
                fmt::format("{} mappings behind the IOMMU of device {:#x}, limit {}; unmap some",
                            mappings_.size(), space.source, limits_.mappings));
  }
  mappings_.emplace(Place{space, range.start()}, mapping);
  Tell({space, mapping});
  return {};
}

void IommuObject::unmap(DeviceSpace space, IovaRange range) {
  RequireNotTelling();
  Tell({space, UnmapEvent{Cut(space, range.page_expanded())}});
}

// Returns what has gone: the range, or more.
IovaRange IommuObject::Cut(DeviceSpace space, IovaRange range) {
  IovaRange gone = range;
  auto at = mappings_.lower_bound({space, range.start()});
  if (at != mappings_.begin() && std::prev(at)->first.space == space) --at;
  while (at != mappings_.end() && at->first.space == space &&
         at->second.range.start() <= range.last()) {
    const MapEvent old = at->second;
    if (!old.range.overlaps(range)) {
      ++at;
      continue;
    }
    at = mappings_.erase(at);
    const IommuEvent whole{space, old};
    const auto keep = [&](Iova first, Iova last) {
      const auto part = whole.clipped(IovaRange::FromFirstAndLast(first, last));
      mappings_.emplace(Place{space, first}, std::get<MapEvent>(part->what));
    };
    if (old.range.start() < range.start()) {
      keep(old.range.start(), Iova(range.start().value() - 1));
    }
    if (old.range.last() > range.last()) {
      if (mappings_.size() < limits_.mappings) {
        keep(range.last() + 1, old.range.last());
      } else {
        gone = IovaRange::FromFirstAndLast(range.start(), old.range.last());
      }
    }
    at = mappings_.upper_bound({space, old.range.start()});
  }
  return gone;
}

Result<void> IommuObject::bind(DeviceSpace space, const PasidBinding& binding) {
  RequireNotTelling();
  if (const PasidBinding* known = this->binding(space); known != nullptr) {
    if (*known == binding) return {};
    unbind(space);
  }
  if (bindings_.size() >= limits_.bindings) {
    return Fail(ErrorCode::kLimit,
                fmt::format("{} PASIDs are bound, limit {}; unbind some before device {:#x} gets "
                            "another one",
                            bindings_.size(), limits_.bindings, space.source));
  }
  bindings_.emplace(space, binding);
  Tell({space, BindPasidEvent{binding}});
  return {};
}

void IommuObject::unbind(DeviceSpace space) {
  RequireNotTelling();
  const auto found = bindings_.find(space);
  if (found == bindings_.end()) return;
  const PasidBinding binding = found->second;
  bindings_.erase(found);
  Cut(space, IovaRange::FromFirstAndLast(Iova(0), Iova(~uint64_t{0})));
  Tell({space, UnbindPasidEvent{binding}});
}

const PasidBinding* IommuObject::binding(DeviceSpace space) const {
  const auto found = bindings_.find(space);
  return found == bindings_.end() ? nullptr : &found->second;
}

void IommuObject::notify(const IommuEvent& event) {
  MVGPU_CHECK(event.kind() != IommuEventKind::kMap && event.kind() != IommuEventKind::kUnmap &&
              event.kind() != IommuEventKind::kBindPasid &&
              event.kind() != IommuEventKind::kUnbindPasid);
  Tell(event);
}

}  // namespace mvgpu::domain
