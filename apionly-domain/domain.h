#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>

#include "apionly-domain/access.h"
#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/memory/guest_file.h"

namespace mvgpu::domain {

// One stored translation: IOVAs that the VMM gave a meaning. Without a file (ROM, anonymous RAM,
// BARs of other devices) only the VMM itself can reach the memory.
struct Mapping {
  IovaRange iova;
  Access access;
  std::shared_ptr<GuestFile> file;  // null: no file
  uint64_t file_offset = 0;         // bytes; of the first IOVA

  // File offset of an IOVA. REQUIRES: iova.contains(address), file.
  uint64_t offset_of(Iova address) const { return file_offset + (address - iova.start()); }
  uint64_t pages() const { return PagesIn(iova.size()); }
  // The part of this mapping in `part`. REQUIRES: iova.contains(part).
  Mapping slice(IovaRange part) const {
    return {part, access, file, file == nullptr ? 0 : offset_of(part.start())};
  }
  // Whether `next` goes on where this ends, in IOVAs and in the file: together they are like one.
  bool continues_in(const Mapping& next) const {
    return file != nullptr && file == next.file && access == next.access &&
           iova.last() + 1 == next.iova.start() && file_offset + iova.size() == next.file_offset;
  }
};

// Mappings that go together. `mappings` are what is there in `range`, in order; whole mappings, or,
// after a split, parts of some.
struct Unmapping {
  IovaRange range;  // what the VMM asked for, cut down to what is mapped
  std::span<const Mapping> mappings;
};

// A domain hears of every mapping of its container: what is there when it attaches, then each
// change, those that others rely on last, otherwise in the order in which they were attached.
// Called with the container's change lock held, so one call at a time: an implementation
// must not change the container.
class Domain {
 public:
  virtual ~Domain() = default;
  virtual std::string_view name() const = 0;
  // Whether others count on what this domain has mapped (its addresses, or that it holds the
  // pages). They hear of an unmap first, and have let go when this one does, whoever was attached
  // first. Fixed.
  virtual bool is_relied_on() const { return false; }
  // Takes the mapping in, as one that nobody may use yet. Errors are the domain's own; the mapping
  // is not there then.
  virtual Result<void> on_map(const Mapping& mapping) = 0;
  // After on_map() of every domain succeeded (`mapped`: it may be used from now on), or one failed:
  // the mapping goes again, unused.
  virtual void on_map_done(const Mapping& mapping, bool mapped) = 0;
  // Everything that is held in the mappings has been let go when this returns; kBusy, naming the
  // holders, when a holder does not let go in time.
  virtual Result<void> on_unmap(const Unmapping& unmapping) = 0;
  // After on_unmap() of every domain succeeded (`unmapped`), or one refused: the mappings are
  // usable again.
  virtual void on_unmap_done(const Unmapping& unmapping, bool unmapped) = 0;
};

}  // namespace mvgpu::domain
