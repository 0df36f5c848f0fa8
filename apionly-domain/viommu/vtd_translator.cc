#include "apionly-domain/viommu/vtd_translator.h"

#include "apionly-domain/nested/two_stage.h"
#include "apionly-domain/nested/vtd_first_stage.h"
#include "apionly-domain/nested/vtd_second_stage.h"

namespace mvgpu::domain {

namespace {

VtdMode ModeOf(vtd::Translation translation) {
  switch (translation) {
    case vtd::Translation::kFirstStage:
      return VtdMode::kFirstStage;
    case vtd::Translation::kNested:
      return VtdMode::kNested;
    default:
      return VtdMode::kSecondStage;
  }
}

VtdFirstStageFormat FirstStage(const vtd::PasidEntry& entry, uint8_t host_address_width) {
  // Addresses in nested tables are guest-physical: the second stage says how far those go.
  constexpr uint8_t kAnyAddress = 52;
  const bool is_nested = entry.translation() == vtd::Translation::kNested;
  return {{.levels = entry.first_stage_levels(),
           .host_address_width = is_nested ? kAnyAddress : host_address_width,
           .write_protect = entry.write_protects(),
           .is_nested = is_nested}};
}

VtdSecondStageFormat SecondStage(const vtd::PasidEntry& entry, uint8_t host_address_width) {
  return {{.levels = entry.second_stage_levels(),
           .host_address_width = host_address_width,
           .keeps_accessed = entry.keeps_second_accessed()}};
}

// Of a page with the interrupt range in it, the part beside that: it is 1 MiB, and so are the
// parts.
Leaf WithoutInterrupts(Leaf leaf) {
  constexpr uint64_t kInterrupts = 0xfee0'0000;
  constexpr uint64_t kInterruptsSize = uint64_t{1} << 20;
  if (leaf.span > kInterruptsSize && leaf.out / leaf.span == kInterrupts / leaf.span) {
    leaf.span = kInterruptsSize;
  }
  return leaf;
}

}  // namespace

VtdResult VtdTranslator::translate(vtd::RootAddress root, const VtdRequest& request) const {
  const auto at = [&](VtdFault fault) {
    fault.address = request.address;
    return tl::unexpected(fault);
  };
  const auto context = tables_.context(root, request.source);
  if (!context) return at(context.error());
  const auto pasid = tables_.pasid_of(*context, request);
  if (!pasid) return at(pasid.error());
  const auto entry = tables_.pasid_entry(*context, *pasid);
  if (!entry) return at(entry.error());
  if (const auto admitted = tables_.admit(*entry, request); !admitted) return at(admitted.error());
  const auto leaf =
      walk(*entry, request.address, Wanted(request.wanted.rights, IsPrivileged(*context, request)));
  if (!leaf) return at(leaf.error());
  return TargetOf(*leaf);
}

tl::expected<Leaf, VtdFault> VtdTranslator::walk(const vtd::PasidEntry& entry, uint64_t address,
                                                 Wanted wanted) const {
  if (entry.translation() == vtd::Translation::kPassThrough) return PassThrough(entry, address);
  const WalkResult leaf = Walk(entry, address, wanted);
  if (leaf) return WithoutInterrupts(*leaf);
  const Fault& fault = leaf.error();
  const bool is_write = (wanted.rights & kMayWrite) != 0;
  return tl::unexpected(VtdFault{.reason = VtdFaultReason(fault, ModeOf(entry.translation()),
                                                          is_write, entry.first_stage_levels()),
                                 .stage = fault.stage,
                                 .address = address,
                                 .stage_input = fault.address,
                                 .is_hidden = entry.hides_faults()});
}

tl::expected<Leaf, VtdFault> VtdTranslator::PassThrough(const vtd::PasidEntry& entry,
                                                        uint64_t address) const {
  constexpr uint64_t kLargest = uint64_t{1} << 30;
  VtdFault fault{.address = address, .stage_input = address, .is_hidden = entry.hides_faults()};
  if (address >> tables_.abilities().host_address_width != 0) {
    fault.reason = static_cast<uint8_t>(VtdReason::kBeyondHost);
    return tl::unexpected(fault);
  }
  if (vtd::IsInterrupt(address)) {
    fault.reason = static_cast<uint8_t>(VtdReason::kInterruptRange);
    return tl::unexpected(fault);
  }
  return WithoutInterrupts({address, kLargest, kMayRead | kMayWrite | kMayExecute});
}

WalkResult VtdTranslator::Walk(const vtd::PasidEntry& entry, uint64_t address,
                               Wanted wanted) const {
  const uint8_t width = tables_.abilities().host_address_width;
  const GuestTables& memory = tables_.memory();
  VtdSecondStage::Trail trail;
  const VtdSecondStage second(SecondStage(entry, width), &memory, &trail);
  switch (entry.translation()) {
    case vtd::Translation::kFirstStage:
      return VtdFirstStage(FirstStage(entry, width), &memory)
          .walk(entry.first_stage(), address, wanted);
    case vtd::Translation::kNested: {
      const StageTwoTables through(&second, entry.second_stage(), &memory);
      const VtdFirstStage first(FirstStage(entry, width), &through);
      return TwoStageWalker(&first, &second, entry.second_stage())
          .walk(entry.first_stage(), address, wanted);
    }
    default:
      return second.walk(entry.second_stage(), address, wanted);
  }
}

}  // namespace mvgpu::domain
