#pragma once

// The address space that a device's requests are made in, where that is not guest memory itself:
// its addresses are translated, and mean something else when the guest says so.
//
//   device model --translate()--> DmaSpace --> runs of guest memory --> pins and mappings, as usual
//        ^                            |
//        +------ on_invalidated() ----+   the guest changed something: let go
//
// A device keeps what it was told (as a device with a TLB of its own does, PCIe ATS) until it hears
// that it is void. A device without an IOMMU before it has no DmaSpace, and no cost from this.

#include <vector>

#include "apionly-domain/access.h"
#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"

namespace mvgpu::domain {

// Addresses of the device in a row that lie in a row in guest memory.
struct DmaRun {
  IovaRange from;
  Iova to;  // of the first byte, as the VMM maps guest memory
  bool operator==(const DmaRun&) const = default;
};

class DmaSpace {
 public:
  class User {
   public:
    virtual ~User() = default;
    // What was translated in these pages is void. Pins and mappings behind it are to be given
    // up before this returns: the guest hears then that its invalidation is complete. Must not
    // translate, nor change the user.
    virtual void on_invalidated(IovaRange range) = 0;
  };

  virtual ~DmaSpace() = default;

  // Null: nobody keeps translations any more. The user outlives the space, or leaves it.
  virtual void set_user(User* user) = 0;

  // Where the addresses lie; runs without gaps, in order, all of the range. What lies there need
  // not be memory. Errors: kNotMapped (the guest's tables do not allow it; the guest was told),
  // kLimit (nobody would say when the translation becomes void), kPending (the guest was asked for
  // pages: undo what was begun, and ask again when it has answered).
  virtual Result<std::vector<DmaRun>> translate(IovaRange range, Access access) = 0;
};

}  // namespace mvgpu::domain
