#include "apionly-domain/nested/zpci_table.h"

#include <algorithm>
#include <array>

namespace mvgpu::domain {

namespace {

using zpci::Designation;

// Levels of the walk.
constexpr unsigned kSegmentLevel = 1;
constexpr unsigned kRegionThirdLevel = 2;

std::optional<uint8_t> FirstLevelOf(Designation designation) {
  switch (designation) {
    case Designation::kPageTable:
      return uint8_t{0};
    case Designation::kSegment:
      return uint8_t{kSegmentLevel};
    case Designation::kRegionThird:
      return uint8_t{kRegionThirdLevel};
    case Designation::kRegionSecond:
      return uint8_t{kRegionThirdLevel + 1};
    case Designation::kRegionFirst:
      return uint8_t{kRegionThirdLevel + 2};
    case Designation::kPageFrame:
      break;
  }
  return std::nullopt;
}

// The one frame of designation PFAA: what all addresses below its size are mapped to.
WalkResult FrameOf(uint64_t iota, uint64_t address) {
  constexpr std::array<unsigned, 3> kShifts{12, 20, 31};
  const uint64_t size_code = iota & zpci::kIotaFrameSizeMask;
  Fault fault{.stage = ZpciFormat::kStage, .address = address, .device_address = address};
  fault.code = FaultCode::kBadRoot;
  if ((iota & zpci::kIotaTranslate) == 0 || size_code >= kShifts.size()) {
    return tl::unexpected(fault);
  }
  const uint64_t span = uint64_t{1} << kShifts[size_code];
  fault.code = FaultCode::kInputRange;
  if (address >= span) return tl::unexpected(fault);
  const Rights rights = (iota & zpci::kIotaProtect) != 0 ? kMayRead : kMayRead | kMayWrite;
  return Leaf{(iota & zpci::kPageFrame & ~(span - 1)) | address, span, rights, rights};
}

}  // namespace

tl::expected<WalkStart<ZpciFormat::Path>, NoStart> ZpciFormat::begin(uint64_t iota,
                                                                     uint64_t address) const {
  const auto level = FirstLevelOf(zpci::DesignationOf(iota));
  if (!level || (iota & zpci::kIotaTranslate) == 0) {
    return tl::unexpected(NoStart{FaultCode::kBadRoot});
  }
  const uint64_t origin = iota & (*level == 0 ? zpci::kPageFrame : zpci::kRegionOrigin);
  const unsigned width = shift(*level) + index_bits(*level);
  if (width < 64 && address >> width != 0) {
    return tl::unexpected(NoStart{FaultCode::kInputRange});
  }
  WalkStart<Path> start{.table = origin, .level = *level, .path = {}};
  start.path.is_protected = (iota & zpci::kIotaProtect) != 0;
  return start;
}

TableEntry ZpciFormat::DecodeTable(uint64_t entry, unsigned level, Path* path) const {
  if (entry == 0) return TableEntry::Bad(FaultCode::kNullEntry);
  if ((entry & zpci::kTableInvalid) != 0) return TableEntry::Hole();
  const bool is_region = level >= kRegionThirdLevel;
  if (is_region &&
      ((entry & zpci::kTableLength) != zpci::kTableLength || (entry & zpci::kTableOffset) != 0)) {
    return TableEntry::Bad(FaultCode::kTableLength);
  }
  if ((entry & zpci::kTypeMask) >> zpci::kTypeShift != level - kSegmentLevel) {
    return TableEntry::Bad(FaultCode::kTableType);
  }
  path->is_protected |= (entry & zpci::kProtect) != 0;
  if (!is_region && (entry & zpci::kSegmentFc) != 0) {
    return TableEntry::Leaf(entry & zpci::kSegmentFrame);
  }
  const uint64_t origin = entry & (is_region ? zpci::kRegionOrigin : zpci::kSegmentOrigin);
  // No table is at 0: nothing there is a guest's that runs.
  if (origin == 0) return TableEntry::Bad(FaultCode::kTableType);
  return TableEntry::Table(origin);
}

WalkResult ZpciTable::walk(uint64_t iota, uint64_t address, Wanted wanted) const {
  if (zpci::DesignationOf(iota) != Designation::kPageFrame) {
    return radix_.walk(iota, address, wanted);
  }
  const WalkResult leaf = FrameOf(iota, address);
  if (leaf && (wanted.rights & kMayWrite & ~leaf->rights) != 0) {
    return tl::unexpected(Fault{.code = FaultCode::kNoWrite,
                                .stage = ZpciFormat::kStage,
                                .address = address,
                                .span = leaf->span,
                                .device_address = address});
  }
  return leaf;
}

Stretch ZpciTable::walk_pages(uint64_t iota, uint64_t address, std::span<PageWord> words) const {
  if (zpci::DesignationOf(iota) != Designation::kPageFrame) {
    return radix_.walk_pages(iota, address, words);
  }
  const WalkResult leaf = FrameOf(iota, address);
  if (!leaf) return {.fault = leaf.error(), .fault_pages = PagesIn(~address) + 1};
  const uint64_t count = std::min<uint64_t>(words.size(), PagesIn(leaf->span - address));
  for (uint64_t i = 0; i < count; ++i) {
    words[i] = MakePageWord(leaf->out + BytesIn(i), leaf->rights);
  }
  return {.pages = count, .fault = {}};
}

}  // namespace mvgpu::domain
