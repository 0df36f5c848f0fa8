#pragma once

// Memory that a guest gives back through a balloon: pages that it lists are taken out of the
// device's reach and unpinned before they go, and nothing brings them back meanwhile.
//
// Why somebody has to say so. A file of guest memory tells nobody that a part of it has gone, and
// userfaultfd(2) does not help where memory is another process's (Linux 6.18,
// userfaultfd_test.cc): its REMOVE and UNMAP events are those of one view in one process, by
// madvise() and munmap() there. A hole that is punched into the file (FALLOC_FL_PUNCH_HOLE), or
// madvise() on another view of it, by whatever process, makes no event. And the one who removes
// goes on as soon as the event has been read, not when it has been dealt with. MMU notifiers of the
// kernel do both, and are not to be had outside of it.

#include <cstdint>
#include <span>
#include <vector>

#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/coiommu/coiommu_pins.h"
#include "apionly-domain/faults/faulting_domain.h"

namespace mvgpu::domain {

// Thread-safe: what it asks is.
class Balloon {
 public:
  // Who has the memory.
  class Owner {
   public:
    virtual ~Owner() = default;
    // Nothing of ours holds or maps these whole pages now: gives them to the host, for example by a
    // hole in their file. They are the guest's again, empty, when it touches them. On an error they
    // are as they were.
    virtual Result<void> give_back(IovaRange range) = 0;
  };
  struct Parts {               // all outlive the balloon
    FaultingDomain* faulting;  // null: memory is not mapped on demand
    CoiommuPins* cooperative;  // null: the guest does not track its DMA
    Owner* owner;
  };
  struct Given {
    uint64_t pages = 0;   // that went, each once
    uint64_t in_use = 0;  // of the request, left alone: a driver has them mapped for a device
    uint64_t failed = 0;  // of the request, left alone: the owner could not
  };
  // As many as Linux's driver puts into one request (VIRTIO_BALLOON_ARRAY_PFNS_MAX).
  static constexpr size_t kMaxFrames = 256;

  explicit Balloon(Parts parts) : parts_(parts) {}

  // The guest inflates by these frames of 4 KiB (virtio 1.2, 5.5.6.1), in any order, the same one
  // several times or not. Error: kInvalid, more than kMaxFrames; nothing happens then.
  Result<Given> inflate(std::span<const uint32_t> frames);

 private:
  // Runs of frames that may go, in order.
  std::vector<PageRun> RunsToGive(std::span<const uint32_t> frames, Given* given);
  Result<void> Give(PageRun run);

  const Parts parts_;
};

}  // namespace mvgpu::domain
