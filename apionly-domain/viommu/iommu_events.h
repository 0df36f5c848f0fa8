#pragma once

// What an IOMMU that a guest sees tells those who stand behind it: of one device, and of one of its
// address spaces (a PASID; none for requests without one).

#include <cstdint>
#include <optional>
#include <variant>

#include "apionly-domain/access.h"
#include "apionly-domain/base/address.h"
#include "apionly-domain/faults/page_request.h"
#include "apionly-domain/nested/table_walker.h"
#include "apionly-domain/viommu/invalidation_descriptor.h"
#include "apionly-domain/viommu/vtd_entries.h"

namespace mvgpu::domain {

// One of the address spaces of a device.
struct DeviceSpace {
  SourceId source = 0;
  std::optional<Pasid> pasid = std::nullopt;
  auto operator<=>(const DeviceSpace&) const = default;
};

// How the guest wants a PASID translated: enough for a host to do the same with tables of its own
// as the second stage.
struct PasidBinding {
  vtd::Translation translation = vtd::Translation::kFirstStage;
  Pasid pasid = 0;           // under which the guest's tables have it, and its invalidations
  DomainId domain = 0;       // likewise
  uint64_t first_stage = 0;  // root; guest-physical when nested
  uint8_t first_stage_levels = 0;
  uint64_t second_stage = 0;
  uint8_t second_stage_levels = 0;
  bool takes_supervisors = false;
  bool write_protects = false;

  static PasidBinding Of(Pasid pasid, const vtd::PasidEntry& entry);
  bool operator==(const PasidBinding&) const = default;
};

// A bit for each kind, so that listeners can name several.
enum class IommuEventKind : uint16_t {
  kMap = 1 << 0,
  kUnmap = 1 << 1,
  kDeviceTlbUnmap = 1 << 2,
  kBindPasid = 1 << 3,
  kUnbindPasid = 1 << 4,
  kPasidIotlb = 1 << 5,
  kPasidCache = 1 << 6,
  kPageRequest = 1 << 7,
  kPageResponse = 1 << 8,
};
using IommuEventKinds = uint16_t;  // a set
inline constexpr IommuEventKinds kAllIommuEvents = (1 << 9) - 1;
constexpr IommuEventKinds operator|(IommuEventKind a, IommuEventKind b) {
  return static_cast<IommuEventKinds>(static_cast<unsigned>(a) | static_cast<unsigned>(b));
}

struct MapEvent {
  IovaRange range;
  GuestPhys out;  // of the first address; the rest lies behind it
  Access access;
  bool operator==(const MapEvent&) const = default;
};
struct UnmapEvent {  // nothing of the range is to be used any more
  IovaRange range;
  bool operator==(const UnmapEvent&) const = default;
};
struct DeviceTlbUnmapEvent {
  IovaRange range;
  bool operator==(const DeviceTlbUnmapEvent&) const = default;
};
struct BindPasidEvent {
  PasidBinding binding;
  bool operator==(const BindPasidEvent&) const = default;
};
struct UnbindPasidEvent {
  PasidBinding binding;  // that was
  bool operator==(const UnbindPasidEvent&) const = default;
};
struct PasidIotlbEvent {
  IovaRange range;
  bool leaf_only = false;
  bool operator==(const PasidIotlbEvent&) const = default;
};
struct PasidCacheEvent {
  bool operator==(const PasidCacheEvent&) const = default;
};
struct PageRequestEvent {  // one of a FaultGroup
  Iova page;
  Access access = Access::kRead;
  uint16_t group = 0;  // PRGI
  bool is_last = true;
  bool operator==(const PageRequestEvent&) const = default;
};
struct PageResponseEvent {
  uint16_t group = 0;
  FaultAnswer answer = FaultAnswer::kSuccess;
  bool operator==(const PageResponseEvent&) const = default;
};

struct IommuEvent {
  DeviceSpace space;
  std::variant<MapEvent, UnmapEvent, DeviceTlbUnmapEvent, BindPasidEvent, UnbindPasidEvent,
               PasidIotlbEvent, PasidCacheEvent, PageRequestEvent, PageResponseEvent>
      what;

  IommuEventKind kind() const { return static_cast<IommuEventKind>(1u << what.index()); }
  // The addresses that it is about; nullopt for those that are about a whole address space.
  std::optional<IovaRange> range() const;
  // The part of it that lies in a range; nullopt when there is none.
  std::optional<IommuEvent> clipped(IovaRange to) const;
  bool operator==(const IommuEvent&) const = default;
};

}  // namespace mvgpu::domain
