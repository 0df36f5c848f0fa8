#include "apionly-domain/nested/vmsa.h"

namespace mvgpu::domain {

namespace vmsa {

TableEntry DecodeShape(uint64_t entry, unsigned level, unsigned output_bits, FlagOptions flags) {
  if ((entry & kValid) == 0) return TableEntry::Hole();
  const bool is_table = level > 0 && (entry & kTable) != 0;
  const bool is_page = level == 0 && (entry & kTable) != 0;
  const bool is_block = !is_table && level > 0 && level <= kLargestBlockLevel;
  if (!is_table && !is_page && !is_block) return TableEntry::Hole();  // reserved: not valid
  uint64_t address = entry & kAddress;
  if (is_block) address &= ~((uint64_t{1} << Shift(level)) - 1);
  if (output_bits < 48 && address >> output_bits != 0) {
    return TableEntry::Bad(FaultCode::kOutputRange);
  }
  if (is_table) return TableEntry::Table(address);
  if ((entry & kAccessFlag) == 0 && !flags.sets_access_flag && !flags.ignores_access_flag) {
    return TableEntry::Bad(FaultCode::kAccessFlag);
  }
  return TableEntry::Leaf(address);
}

}  // namespace vmsa

uint8_t SmmuEventType(const Fault& fault) {
  switch (fault.code) {
    case FaultCode::kNotPresent:
    case FaultCode::kInputRange:
      return 0x10;  // F_TRANSLATION
    case FaultCode::kOutputRange:
      return 0x11;  // F_ADDR_SIZE
    case FaultCode::kAccessFlag:
      return 0x12;  // F_ACCESS
    case FaultCode::kNoRead:
    case FaultCode::kNoWrite:
    case FaultCode::kNoExecute:
    case FaultCode::kNotForUser:
      return 0x13;  // F_PERMISSION
    case FaultCode::kBadRoot:
      return fault.stage == 2 ? 0x4 : 0xa;  // C_BAD_STE, C_BAD_CD
    default:
      return 0xb;  // F_WALK_EABT
  }
}

uint8_t SmmuEventClass(const Fault& fault) { return fault.on_table ? 1 : 2; }

}  // namespace mvgpu::domain
