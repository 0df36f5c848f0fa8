#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/viommu/dma_space.h"
#include "dma-cache/dma_mapping.h"
#include "dma-cache/dma_user.h"
#include "gpu-model/page_budget.h"

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
// Where the list is in a DmaSpace, an extent is what lies in a row there and in guest memory. An
// invalidation makes each extent that it touches untranslated: its hold is given up, the addresses
// stay, and a copy translates again the pages that it needs.
//
// Not thread-safe.
class Backing {
 public:
  // Where the pages come from; all outlive the backing.
  struct Memory {
    dma::DmaUser* user;
    const domain::ApiOnlyDomain* domain;
    domain::DmaSpace* space = nullptr;  // null: the list's addresses are guest memory's
    PageBudget* translated = nullptr;   // of a space: each page of the list is charged
  };
  // Pins and maps every entry that can be held, or nothing. Errors: kInvalid (no entries, an empty
  // one, a wrapping address) or those of DmaUser::map(), DmaSpace::translate() and PageBudget.
  // After kPending the same list is to come again.
  static Result<Backing> Create(std::span<const BackingEntry> entries, const Memory& memory);

  uint64_t size() const { return size_; }        // bytes
  uint64_t entries() const { return entries_; }  // as the guest gave them
  size_t extents() const { return extents_.size(); }

  // Copies the lines to `destination`, line n to n * destination_stride; returns the bytes copied.
  // What lies behind the end of the backing is left alone, as QEMU does. Asks the cache for the
  // pages first: one call per extent that is touched, each of them a hit while the hold is valid.
  // Errors: kInvalid (starts behind the end) and those of DmaSpace::translate(), DmaUser::map(),
  // DmaMapping::read() and ApiOnlyDomain::read(); after an error some lines may have been copied.
  // After kPending the same copy is to be asked for again: all bytes that were missing have been
  // asked for. REQUIRES: destination.size() >= (lines - 1) * destination_stride + line_bytes.
  Result<uint64_t> copy(const LineBlock& block, std::span<std::byte> destination,
                        uint64_t destination_stride);

  // The translations of these addresses are void: gives up what is held by them.
  void forget(IovaRange range);

 private:
  struct Extent {
    uint64_t offset;  // of its first byte within the backing
    IovaRange iova;   // in guest memory; untranslated, the same as `from`
    Iova from;        // of its first byte, as the guest's list has it
    dma::DmaMapping hold{};
    bool is_copied = false;  // cannot be held
    bool is_translated = true;

    IovaRange listed() const {
      return IovaRange::FromFirstAndLast(from, from + (iova.last() - iova.start()));
    }
    // The same for a part of what is listed.
    Extent part(IovaRange listed_part, Iova to, bool translated) const;
  };
  // A part of an untranslated extent, and what came of it.
  struct Need {
    size_t extent;
    IovaRange listed;
    std::vector<domain::DmaRun> runs;
  };
  // The part of an extent that a copy needs, and the use of it that lasts for the copy.
  struct Use {
    size_t extent;
    IovaRange iova;
    dma::DmaMapping mapping;
  };

  explicit Backing(const Memory& memory) : memory_(memory) {}
  Result<void> Append(const BackingEntry& entry);
  // Translates the pages of a block that are not.
  Result<void> TranslateFor(const LineBlock& block);
  std::vector<Need> NeedsOf(const LineBlock& block) const;
  void Split(std::vector<Need> needs);
  void MergeUntranslated();
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

  Memory memory_;
  PageCharge charge_;
  std::vector<Extent> extents_;  // sorted by offset, without gaps
  uint64_t size_ = 0;
  uint64_t entries_ = 0;
  size_t unheld_extents_ = 0;        // with is_copied
  size_t untranslated_extents_ = 0;  // without is_translated
};

}  // namespace mvgpu::gpu
