#pragma once

#include <cstddef>

#include "apionly-domain/access.h"
#include "apionly-domain/assigned/assigned_space.h"
#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"

namespace mvgpu::domain {

// Where guest pages that come and go one by one, at IOVAs that the guest knows, are shown to a
// device. Thread-safe.
class DeviceTarget {
 public:
  virtual ~DeviceTarget() = default;
  // From now on the device reaches pinned memory from `host` on. Whole pages, none of them mapped
  // by the caller. On an error none is mapped.
  virtual Result<void> map(IovaRange iova, std::byte* host, Access access) = 0;
  // Whole pages, all of them mapped, in any cut. The device may reach them until the next flush().
  virtual void unmap(IovaRange iova) = 0;
  // From now on the device does not reach what was unmapped.
  virtual void flush() = 0;
  // Both, for one range.
  virtual void unmap_and_flush(IovaRange iova) {
    unmap(iova);
    flush();
  }
  // Whether the device reaches the memory from `host` on there, as it was mapped.
  virtual bool shows(IovaRange iova, const std::byte* host) const = 0;
  // Whether the device used the page since this was asked last. Only tables with accessed flags
  // know (VT-d's second stage, SMMUv3 with HTTU); the others say no.
  virtual bool take_accessed(Iova /*page*/) { return false; }
};

// The addresses of an assigned device. With AssignedSpace::Options::maps_each_page nothing that is
// unmapped takes its neighbours out of reach for a moment.
class SpaceTarget final : public DeviceTarget {
 public:
  // `space` must outlive the target.
  explicit SpaceTarget(AssignedSpace* space) : space_(*space) {}

  Result<void> map(IovaRange iova, std::byte* host, Access access) override {
    return space_.map_at(iova, host, access);
  }
  void unmap(IovaRange iova) override { space_.unmap(iova); }
  void flush() override { space_.flush(); }
  void unmap_and_flush(IovaRange iova) override { space_.unmap_and_flush(iova); }
  bool shows(IovaRange iova, const std::byte* host) const override {
    return space_.shows(iova, host);
  }

 private:
  AssignedSpace& space_;
};

}  // namespace mvgpu::domain
