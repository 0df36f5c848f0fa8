#include "apionly-domain/viommu/invalidation_descriptor.h"

#include <algorithm>
#include <bit>

#include "apionly-domain/base/check.h"

namespace mvgpu::domain {

namespace {

using vtd::Bit;
using vtd::Field;
using Decoded = tl::expected<InvalidationDescriptor, QueueError>;

constexpr tl::unexpected<QueueError> Bad(QueueError error) { return tl::unexpected(error); }

// What a type may have set, and whether it takes 256 bits.
struct Shape {
  uint8_t type;
  uint64_t reserved[2];
  bool is_wide;
};
// Bits 11:9 of the first word are the upper part of the type.
constexpr std::array kShapes{
    Shape{1, {0xfffc'0000'0000'f1c0, ~uint64_t{0}}, false},
    Shape{2, {0xffff'ffff'0000'f100, 0xf80}, false},
    Shape{3, {0x000f'0000'ffe0'01f0, 0xffe}, false},
    Shape{4, {0xffff'0000'07ff'f1e0, ~uint64_t{0}}, false},
    Shape{5, {0x0000'0000'ffff'f100, 0x3}, false},
    Shape{6, {0xfff0'0000'0000'f1c0, 0xf80}, true},
    Shape{7, {0xfff0'0000'0000'f1c0, ~uint64_t{0}}, true},
    Shape{8, {0, 0x7fe}, true},
    Shape{9, {0xfff0'0000'0000'01e0, 0xffff'ffff'ffff'f003}, true},
};

uint8_t Granularity(uint64_t word) { return static_cast<uint8_t>(Field(word, 4, 2)); }
DomainId DomainIn(uint64_t word) { return static_cast<DomainId>(Field(word, 16, 16)); }
Pasid PasidIn(uint64_t word) { return static_cast<Pasid>(Field(word, 32, vtd::kPasidBits)); }

IovaRange Aligned(uint64_t address, unsigned shift) {
  const uint64_t mask = shift >= 64 ? ~uint64_t{0} : (uint64_t{1} << shift) - 1;
  return IovaRange::FromFirstAndLast(Iova(address & ~mask), Iova(address | mask));
}

// Of types 2 and 6: address, and log2 of the pages.
tl::expected<IovaRange, QueueError> PagesIn(uint64_t word, const DescriptorRules& rules) {
  const auto order = static_cast<unsigned>(Field(word, 0, 6));
  if (order > rules.most_address_mask) return Bad(QueueError::kReserved);
  return Aligned(word & ~kPageMask, kPageShift + order);
}

// Of types 3 and 8. With S the lowest bit that is clear says how large the range is; none: all.
IovaRange DeviceRange(uint64_t word, bool is_sized) {
  const uint64_t address = word & ~kPageMask;
  if (!is_sized) return Aligned(address, kPageShift);
  const auto ones = static_cast<unsigned>(std::countr_one(address >> kPageShift));
  return Aligned(address, kPageShift + ones + 1);
}

Decoded DecodeContext(uint64_t word) {
  if (Granularity(word) == 0) return Bad(QueueError::kReserved);
  return ContextInvalidation{
      .granularity = static_cast<ContextInvalidation::Granularity>(Granularity(word)),
      .domain = DomainIn(word),
      .source = static_cast<SourceId>(Field(word, 32, 16)),
      .function_mask = static_cast<uint8_t>(Field(word, 48, 2))};
}

Decoded DecodeIotlb(uint64_t low, uint64_t high, const DescriptorRules& rules) {
  if (Granularity(low) == 0) return Bad(QueueError::kReserved);
  IotlbInvalidation out{
      .granularity = static_cast<IotlbInvalidation::Granularity>(Granularity(low)),
      .domain = DomainIn(low),
      .leaf_only = Bit(high, 6)};
  if (out.granularity == IotlbInvalidation::Granularity::kPages) {
    const auto range = PagesIn(high, rules);
    if (!range) return Bad(range.error());
    out.range = *range;
  }
  return out;
}

Decoded DecodeDeviceTlb(uint64_t low, uint64_t high) {
  return DeviceTlbInvalidation{.source = static_cast<SourceId>(Field(low, 32, 16)),
                               .range = DeviceRange(high, Bit(high, 0))};
}

Decoded DecodeInterruptEntry(uint64_t word) {
  return InterruptEntryInvalidation{.is_global = !Bit(word, 4),
                                    .index = static_cast<uint16_t>(Field(word, 32, 16)),
                                    .index_mask = static_cast<uint8_t>(Field(word, 27, 5))};
}

Decoded DecodeWait(uint64_t low, uint64_t high, const DescriptorRules& rules) {
  InvalidationWait out{.interrupts = Bit(low, 4),
                       .status = static_cast<uint32_t>(low >> 32),
                       .is_fence = Bit(low, 6),
                       .drains_page_requests = Bit(low, 7)};
  if (out.drains_page_requests && !rules.may_drain) return Bad(QueueError::kReserved);
  if (Bit(low, 5)) out.status_address = high;
  return out;
}

Decoded DecodePasidIotlb(uint64_t low, uint64_t high, const DescriptorRules& rules) {
  constexpr uint8_t kAll = 2;
  constexpr uint8_t kPages = 3;
  PasidIotlbInvalidation out{
      .domain = DomainIn(low), .pasid = PasidIn(low), .leaf_only = Bit(high, 6)};
  if (Granularity(low) != kAll && Granularity(low) != kPages) return Bad(QueueError::kReserved);
  if (Granularity(low) == kPages) {
    const auto range = PagesIn(high, rules);
    if (!range) return Bad(range.error());
    out.range = *range;
  }
  return out;
}

Decoded DecodePasidCache(uint64_t word) {
  constexpr uint8_t kReservedGranularity = 2;
  if (Granularity(word) == kReservedGranularity) return Bad(QueueError::kReserved);
  return PasidCacheInvalidation{
      .granularity = static_cast<PasidCacheInvalidation::Granularity>(Granularity(word)),
      .domain = DomainIn(word),
      .pasid = PasidIn(word)};
}

Decoded DecodePasidDeviceTlb(uint64_t low, uint64_t high) {
  return DeviceTlbInvalidation{.source = static_cast<SourceId>(Field(low, 16, 16)),
                               .pasid = PasidIn(low),
                               .all_pasids = Bit(high, 0),
                               .range = DeviceRange(high, Bit(high, 11))};
}

Decoded DecodePageGroupResponse(uint64_t low, uint64_t high) {
  const auto response = VtdGroupResponse::Decode({low, high});
  if (!response) return Bad(QueueError::kReserved);
  return *response;
}

}  // namespace

SourceId ContextInvalidation::source_mask() const {
  constexpr std::array<SourceId, 4> kMasks{0xffff, 0xfffb, 0xfff9, 0xfff8};
  return kMasks[function_mask & 3];
}

Decoded DecodeInvalidation(std::span<const uint64_t> words, const DescriptorRules& rules) {
  MVGPU_DCHECK(words.size() == 2 || words.size() == 4);
  const uint64_t low = words[0];
  const uint64_t high = words[1];
  const uint64_t type = Field(low, 0, 4) | Field(low, 9, 3) << 4;
  const auto shape = std::find_if(kShapes.begin(), kShapes.end(),
                                  [&](const Shape& known) { return known.type == type; });
  if (shape == kShapes.end()) return Bad(QueueError::kType);
  if (shape->is_wide && words.size() == 2) return Bad(QueueError::kWidth);
  if ((low & shape->reserved[0]) != 0 || (high & shape->reserved[1]) != 0 ||
      (words.size() == 4 && (words[2] | words[3]) != 0)) {
    return Bad(QueueError::kReserved);
  }
  switch (type) {
    case 1:
      return DecodeContext(low);
    case 2:
      return DecodeIotlb(low, high, rules);
    case 3:
      return DecodeDeviceTlb(low, high);
    case 4:
      return DecodeInterruptEntry(low);
    case 5:
      return DecodeWait(low, high, rules);
    case 6:
      return DecodePasidIotlb(low, high, rules);
    case 7:
      return DecodePasidCache(low);
    case 8:
      return DecodePasidDeviceTlb(low, high);
    default:
      return DecodePageGroupResponse(low, high);
  }
}

}  // namespace mvgpu::domain
