#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "dma-cache/dma_mapping.h"
#include "dma-cache/dma_user.h"

namespace mvgpu::gpu {

// One entry of the guest's list, as it came: not checked.
struct BackingEntry {
  Iova address;
  uint32_t length = 0;
};

// Equally long pieces of a backing at equal distances: the lines of a rectangle.
struct LineBlock {
  uint64_t offset = 0;      // of the first line, bytes from the start of the backing
  uint64_t line_bytes = 0;  // per line
  uint64_t stride = 0;      // from line to line. REQUIRES: >= line_bytes
  uint64_t lines = 0;
};

// The guest memory behind a resource: a list of pieces that count as one string of bytes. Entries
// that follow each other in the guest's address space are one extent; each extent is held by one
// DmaMapping.
//
// When the VMM takes memory away, mappings become invalid but the list stays. copy() maps what is
// there when it is called and renews the hold of every extent that it touches.
//
// Memory without a file cannot be held. An extent with such pages is copied by the domain each
// time, which asks the VMM for the bytes.
//
// Not thread-safe.
class Backing {
 public:
  // Pins and maps every entry that can be held, or nothing. Errors: kInvalid (no entries, an empty
  // one, a wrapping address) or those of DmaUser::map(). User and domain outlive the backing.
  static Result<Backing> Create(std::span<const BackingEntry> entries, dma::DmaUser* user,
                                const domain::ApiOnlyDomain* domain);

  uint64_t size() const { return size_; }        // bytes
  uint64_t entries() const { return entries_; }  // as the guest gave them
  size_t extents() const { return extents_.size(); }

  // Copies the lines to `destination`, line n to n * destination_stride; returns the bytes copied.
  // What lies behind the end of the backing is left alone, as QEMU does. Asks the cache for the
  // pages first: one call per extent that is touched, each of them a hit while the hold is valid.
  // Errors: kInvalid (starts behind the end) and those of DmaUser::map(), DmaMapping::read() and
  // ApiOnlyDomain::read(); after an error some lines may have been copied. After kPending the same
  // copy is to be asked for again: all bytes that were missing have been asked for. REQUIRES:
  // destination.size() >= (lines - 1) * destination_stride + line_bytes.
  Result<uint64_t> copy(const LineBlock& block, std::span<std::byte> destination,
                        uint64_t destination_stride);

 private:
  struct Extent {
    uint64_t offset;  // of its first byte within the backing
    IovaRange iova;
    dma::DmaMapping hold;
    bool is_copied = false;  // cannot be held
  };
  // The part of an extent that a copy needs, and the use of it that lasts for the copy.
  struct Use {
    size_t extent;
    IovaRange iova;
    dma::DmaMapping mapping;
  };

  Backing(dma::DmaUser* user, const domain::ApiOnlyDomain* domain) : user_(user), domain_(domain) {}
  // Maps a part of an extent, or finds that it has to be copied: then the mapping is empty.
  Result<dma::DmaMapping> Map(Extent& extent, IovaRange part);
  size_t extent_at(uint64_t offset) const;
  // Calls visit(extent index, iova range, offset in destination) for each piece, in ascending
  // order.
  template <typename Visit>
  Result<void> for_each_piece(const LineBlock& block, uint64_t destination_stride,
                              Visit visit) const;
  Result<std::vector<Use>> map_for(const LineBlock& block);
  // Copies the pieces of extents that cannot be held; returns the bytes copied.
  Result<uint64_t> CopyUnheld(const LineBlock& block, std::span<std::byte> destination,
                              uint64_t destination_stride) const;

  dma::DmaUser* user_;
  const domain::ApiOnlyDomain* domain_;
  std::vector<Extent> extents_;  // sorted by offset, without gaps
  uint64_t size_ = 0;
  uint64_t entries_ = 0;
  size_t unheld_extents_ = 0;  // with is_copied
};

}  // namespace mvgpu::gpu
