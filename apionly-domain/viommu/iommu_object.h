#pragma once

// The IOMMU behind a device's address space, as those see it who have to follow it: a host that
// gives the device real translations, a device's own TLB, a page cache.
//
// It does not depend on what the guest does with it. A guest that has not switched its IOMMU on, or
// lets a device pass through, is in bypass: addresses are guest-physical then. The object is there
// all the same, listeners can be registered, and hear of PASIDs that are bound.
//
// Listeners
//   - hear what they asked for: kinds of events, of all or of one address space, in a range of
//     addresses; events that reach beyond the range are cut.
//   - that come late hear first of everything that is: a map for each mapping, a bind for each
//     binding.
//   - may be added and removed in a callback, their own included. Who is added hears the next
//     event; who is removed hears nothing more, not even the rest of what is being told.
//
// What is mapped and bound is remembered, up to a limit: a guest cannot make this grow.
//
// Not thread-safe. Mappings and bindings are not changed from within a callback.

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include <absl/container/btree_map.h>

#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/viommu/iommu_events.h"

namespace mvgpu::domain {

class IommuListener {
 public:
  virtual ~IommuListener() = default;
  virtual void on_iommu_event(const IommuEvent& event) = 0;
};

class IommuObject {
 public:
  struct Limits {
    size_t mappings = 65535;  // as VFIO's dma_entry_limit
    size_t bindings = 4096;
  };
  struct Filter {
    IommuEventKinds kinds = kAllIommuEvents;
    std::optional<DeviceSpace> space = std::nullopt;  // nullopt: all
    IovaRange range = IovaRange::FromFirstAndLast(Iova(0), Iova(~uint64_t{0}));
  };

  explicit IommuObject(Limits limits) : limits_(limits) {}
  // REQUIRES: no listener is registered.
  ~IommuObject();

  // A listener may be added more than once, with different filters, and hears an event once for
  // each that fits. It must be removed before it goes.
  void add(IommuListener* listener, Filter filter);
  void remove(IommuListener* listener);
  bool is_heard(IommuEventKind kind) const;

  // Whether addresses of devices are guest-physical.
  bool is_bypassed() const { return is_bypassed_; }
  void set_bypassed(bool bypassed) { is_bypassed_ = bypassed; }

  // Errors: kOverlap (something is mapped there), kLimit, kInvalid (not whole pages, or the target
  // wraps). Listeners hear nothing then.
  Result<void> map(DeviceSpace space, const MapEvent& mapping);
  // Takes away whatever is mapped in the pages of the range; mappings that reach beyond it are cut.
  // Listeners hear of it in any case: they may know translations from elsewhere. When the middle is
  // cut out of a mapping and the limit leaves no room for both ends, the second one goes, too, and
  // is told.
  void unmap(DeviceSpace space, IovaRange range);

  // Does nothing if it is bound like that already; another binding is unbound first. Errors:
  // kLimit.
  Result<void> bind(DeviceSpace space, const PasidBinding& binding);
  // Its mappings go, too. Does nothing if there is no binding.
  void unbind(DeviceSpace space);
  const PasidBinding* binding(DeviceSpace space) const;
  const absl::btree_map<DeviceSpace, PasidBinding>& bindings() const { return bindings_; }
  size_t mappings() const { return mappings_.size(); }

  // Any event that does not change what is mapped or bound.
  // REQUIRES: its kind is none of map, unmap, bind and unbind.
  void notify(const IommuEvent& event);

 private:
  struct Entry {
    IommuListener* listener;  // null: removed while events are told
    Filter filter;
  };
  struct Place {
    DeviceSpace space;
    Iova start;
    auto operator<=>(const Place&) const = default;
  };
  class Telling;

  void Tell(const IommuEvent& event);
  static void TellOne(const Entry& entry, const IommuEvent& event);
  void Replay(size_t index);
  void RequireNotTelling() const;
  bool IsMapped(DeviceSpace space, IovaRange range) const;
  IovaRange Cut(DeviceSpace space, IovaRange range);

  const Limits limits_;
  bool is_bypassed_ = true;
  absl::btree_map<Place, MapEvent> mappings_;
  absl::btree_map<DeviceSpace, PasidBinding> bindings_;
  std::vector<Entry> entries_;
  unsigned telling_ = 0;  // callbacks under way
};

}  // namespace mvgpu::domain
