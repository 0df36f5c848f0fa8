#pragma once

// The DMA tables of s390 PCI functions: up to five levels, entries big-endian in guest memory.
//
//   table            entries  aligned  bits of the address  an entry stands for
//   region-first     2048     16 KiB   63:53                2^53 bytes
//   region-second    2048     16 KiB   52:42                4 TiB
//   region-third     2048     16 KiB   41:31                2 GiB
//   segment          2048     16 KiB   30:20                1 MiB
//   page             256      2 KiB    19:12                4 KiB
//
// The root is an IOTA, the I/O translation anchor that a guest registers (zpci_function.h): origin,
// T (translation on), and a designation type that says what the origin is of.
//
// Where the architecture leaves it open or is not published, this follows what Linux writes and
// what QEMU accepts (hw/s390x/s390-pci-inst.c, s390-pci-bus.c): a write-protected entry protects
// everything below it, an entry of value 0 is an error and not a hole.

#include <cstdint>
#include <optional>
#include <span>

#include "apionly-domain/nested/radix_walker.h"

namespace mvgpu::domain {

namespace zpci {

// Bits of an IOTA.
inline constexpr uint64_t kIotaTranslate = 0x800;  // T
inline constexpr uint64_t kIotaProtect = 0x200;    // no writes at all
inline constexpr uint64_t kIotaTypeMask = 0x1c;    // designation type, 4:2
inline constexpr unsigned kIotaTypeShift = 2;
inline constexpr uint64_t kIotaFrameSizeMask = 0x3;  // of kPageFrame: 0 4 KiB, 1 1 MiB, 2 2 GiB

enum class Designation : uint8_t {
  kSegment = 0,
  kRegionThird = 1,
  kRegionSecond = 2,
  kRegionFirst = 3,
  kPageFrame = 4,  // PFAA: one frame, no tables
  kPageTable = 7,  // IOPTO: one page table
};
constexpr Designation DesignationOf(uint64_t iota) {
  return static_cast<Designation>((iota & kIotaTypeMask) >> kIotaTypeShift);
}

// Bits of entries.
inline constexpr uint64_t kRegionOrigin = ~uint64_t{0x3fff};
inline constexpr uint64_t kSegmentOrigin = ~uint64_t{0x7ff};
inline constexpr uint64_t kSegmentFrame = ~uint64_t{0xfffff};  // with kSegmentFc
inline constexpr uint64_t kPageFrame = ~uint64_t{0xfff};
inline constexpr uint64_t kSegmentFc = 0x400;    // FC: a frame of 1 MiB, no page table
inline constexpr uint64_t kTableInvalid = 0x20;  // I, of region and segment entries
inline constexpr uint64_t kPageInvalid = 0x400;  // I, of page entries
inline constexpr uint64_t kProtect = 0x200;      // P
inline constexpr uint64_t kTableOffset = 0xc0;   // TO, of region entries: must be 0
inline constexpr uint64_t kTypeMask = 0xc;       // TT: 0 segment, 1 third, 2 second, 3 first
inline constexpr unsigned kTypeShift = 2;
inline constexpr uint64_t kTableLength = 0x3;  // TL, of region entries: must be full, 3

}  // namespace zpci

struct ZpciFormat {
  struct Path {
    bool is_protected = false;
  };
  static constexpr uint8_t kStage = 1;
  static constexpr unsigned kTableBits = 11;
  static constexpr unsigned kPageTableBits = 8;

  unsigned shift(unsigned level) const {
    return level == 0 ? kPageShift : kPageShift + kPageTableBits + (level - 1) * kTableBits;
  }
  unsigned index_bits(unsigned level) const { return level == 0 ? kPageTableBits : kTableBits; }
  tl::expected<WalkStart<Path>, NoStart> begin(uint64_t iota, uint64_t address) const;
  TableEntry decode(uint64_t raw, unsigned level, Path* path) const {
    const uint64_t entry = __builtin_bswap64(raw);
    if (level == 0) return DecodePage(entry, path);
    return DecodeTable(entry, level, path);
  }
  std::optional<FaultCode> refusal(Path path, Wanted wanted) const {
    const bool refuses = path.is_protected && (wanted.rights & kMayWrite) != 0;
    return refuses ? std::optional(FaultCode::kNoWrite) : std::nullopt;
  }
  Rights rights(Path path, bool) const {
    return path.is_protected ? kMayRead : kMayRead | kMayWrite;
  }
  uint64_t marked(uint64_t raw, bool, bool) const { return raw; }  // no such flags
  bool is_interrupt(uint64_t) const { return false; }              // those are not DMA

 private:
  static TableEntry DecodePage(uint64_t entry, Path* path) {
    if ((entry & zpci::kPageInvalid) != 0) return TableEntry::Hole();
    if (entry == 0) return TableEntry::Bad(FaultCode::kNullEntry);
    path->is_protected |= (entry & zpci::kProtect) != 0;
    return TableEntry::Leaf(entry & zpci::kPageFrame);
  }
  TableEntry DecodeTable(uint64_t entry, unsigned level, Path* path) const;
};

// All designations, by the IOTA that a walk is given.
class ZpciTable final : public TableWalker {
 public:
  // The tables must outlive this.
  explicit ZpciTable(const GuestTables* tables) : radix_(ZpciFormat(), tables) {}

  WalkResult walk(uint64_t iota, uint64_t address, Wanted wanted) const override;
  Stretch walk_pages(uint64_t iota, uint64_t address, std::span<PageWord> words) const override;

 private:
  const RadixWalker<ZpciFormat> radix_;
};

}  // namespace mvgpu::domain
