#pragma once

// Guest I/O page tables, walked in software.
//
// A guest that owns an IOMMU writes page tables into its memory. Whoever plays that IOMMU reads
// them: for one address, when a device uses it, or for a range, when the guest says that it changed
// something there (nested_domain.h). All formats are alike in what they answer:
//
//   walk(root, address, wanted) -> {out, span, rights}, or a Fault {code, stage, level, ...}
//
//   address   what the device puts on the bus
//   out       a guest-physical address; after the first of two stages an address of the second
//   span      bytes that the same last entry maps, a power of two
//   rights    what all entries on the way allow together
//
// Invariants
//   - Tables are guest memory: hostile, and changing while they are read. Each entry is read once
//     in a walk, in one access (guest_tables.h), and is checked and used as it was read.
//   - A walk is as long as the format has levels, whatever the tables say: loops in them end.
//   - What is wrong with tables is a Fault, never an error of ours.
//
// Formats: zpci_table.h, vtd_first_stage.h, vtd_second_stage.h, vmsa_stage1.h, vmsa_stage2.h; two
// of them nested: two_stage.h. What they share is radix_walker.h.
//
// Thread-safety: a walker has no state of its own; it may be used by any thread.

#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include <tl/expected.hpp>

#include "apionly-domain/access.h"
#include "apionly-domain/base/address.h"

namespace mvgpu::domain {

// Guest-physical: what a walk ends in. The VMM maps guest memory at IOVAs that are the same.
using GuestPhys = Address<struct GuestPhysKind>;

using Rights = uint8_t;  // a set of these; the first two are those of Access
inline constexpr Rights kMayRead = 1;
inline constexpr Rights kMayWrite = 2;
inline constexpr Rights kMayExecute = 4;

constexpr Rights RightsOf(Access access) { return static_cast<Rights>(access); }

// What a device wants to do at an address. To want nothing asks what is there, and leaves no mark.
struct Wanted {
  constexpr Wanted() = default;
  constexpr Wanted(Access access) : rights(RightsOf(access)) {}  // NOLINT: an access is a wish
  constexpr Wanted(Rights wanted, bool as_supervisor) : rights(wanted), privileged(as_supervisor) {}

  Rights rights = 0;
  bool privileged = false;
};

enum class FaultCode : uint8_t {
  kNotPresent,      // an entry that maps nothing: a hole
  kTableAccess,     // a table is not in guest memory, or may not be read
  kBadRoot,         // the root pointer is none that this walker takes
  kReserved,        // an entry with reserved bits or an encoding without meaning
  kNullEntry,       // zPCI: an entry of value 0
  kTableLength,     // zPCI: a table that is not of full length, or has an offset
  kTableType,       // zPCI: an entry of another table's type, or that points to address 0
  kInputRange,      // the address is beyond the tables' width, or not canonical
  kOutputRange,     // an entry points beyond the width of physical addresses
  kInterruptRange,  // the result is where interrupts are written to
  kAccessFlag,      // VMSA: not accessed yet, and it is the guest that keeps that flag
  kNoRead,          // the four kinds of missing permission
  kNoWrite,
  kNoExecute,
  kNotForUser,
  kUpdateFailed,  // accessed or dirty could not be set: not writable, or changing all the time
};
std::string_view FaultCodeName(FaultCode code);

// The first right that is wanted and not allowed, where each right is refused for itself.
constexpr std::optional<FaultCode> MissingRight(Rights wanted, Rights allowed) {
  const Rights missing = wanted & static_cast<Rights>(~allowed);
  if ((missing & kMayRead) != 0) return FaultCode::kNoRead;
  if ((missing & kMayWrite) != 0) return FaultCode::kNoWrite;
  if ((missing & kMayExecute) != 0) return FaultCode::kNoExecute;
  return std::nullopt;
}

struct Fault {
  FaultCode code = FaultCode::kNotPresent;
  uint8_t stage = 0;        // 1, 2; 0 until a walker has filled in where it happened
  uint8_t level = 0;        // of the table: 0 holds the entries of 4 KiB pages, upwards from there
  uint8_t table_level = 0;  // with on_table: of the table of stage 1 that was fetched
  bool on_table = false;    // stage 2: while a table of stage 1 was fetched, not for its result
  uint64_t address = 0;     // the input of that stage
  uint64_t span = 0;        // bytes for which the same entry is to blame; 0: all addresses
  uint64_t device_address = 0;  // what the device used

  // One line for messages: code, stage, level, addresses.
  std::string ToString() const;
  bool operator==(const Fault&) const = default;
};

struct Leaf {
  uint64_t out = 0;
  uint64_t span = 0;
  Rights rights = 0;
  // Of the rights, those for which another walk would find every flag set already: an answer for
  // them may be kept. None where nothing was wanted, and so nothing was marked.
  Rights marked = 0;
  // Where it leads, whatever is marked.
  bool operator==(const Leaf& other) const {
    return out == other.out && span == other.span && rights == other.rights;
  }
};

using WalkResult = tl::expected<Leaf, Fault>;

// What tables say about one 4 KiB page: its frame and the rights to read and to write; 0 where
// nothing is mapped. Neighbours in IOVAs that are neighbours in guest memory too, with the same
// rights, differ by kPageSize.
using PageWord = uint64_t;
constexpr Access AccessOf(PageWord word) { return static_cast<Access>(word & 3); }
constexpr GuestPhys FrameOf(PageWord word) { return GuestPhys(word & ~kPageMask); }
constexpr PageWord MakePageWord(uint64_t frame, Rights rights) {
  const Rights usable = rights & (kMayRead | kMayWrite);
  return usable == 0 ? 0 : (frame & ~kPageMask) | usable;
}

// What tables say about consecutive pages: `pages` of them, then, maybe, a fault.
struct Stretch {
  uint64_t pages = 0;
  bool is_hole = false;  // none of `pages` is mapped, and there may be more than were asked for
  std::optional<Fault> fault;  // of the page behind them
  uint64_t fault_pages = 0;    // how many pages from there on it is for; at least 1 with a fault
};

class TableWalker {
 public:
  virtual ~TableWalker() = default;

  // One address. Accessed and dirty flags are kept as the format and the wish demand.
  virtual WalkResult walk(uint64_t root, uint64_t address, Wanted wanted) const = 0;

  // Consecutive pages from `address` on: as many as one table or one large entry describes, at most
  // words.size(), unless it is a hole. For somebody who keeps the result and does not ask again:
  // everything is marked as accessed, what may be written as dirty, where the format has that. A
  // user's view: what only a supervisor may do is not mapped.
  // REQUIRES: `address` is page-aligned, words is not empty.
  virtual Stretch walk_pages(uint64_t root, uint64_t address, std::span<PageWord> words) const = 0;
};

}  // namespace mvgpu::domain
