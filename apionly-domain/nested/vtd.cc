#include "apionly-domain/nested/vtd.h"

namespace mvgpu::domain {

namespace {

uint8_t LegacyReason(FaultCode code, bool is_write) {
  switch (code) {
    case FaultCode::kInputRange:
      return 0x4;
    case FaultCode::kTableAccess:
    case FaultCode::kUpdateFailed:
      return 0x7;
    case FaultCode::kReserved:
      return 0xc;
    case FaultCode::kInterruptRange:
      return 0xe;
    case FaultCode::kNoWrite:
      return 0x5;
    case FaultCode::kNoRead:
      return 0x6;
    default:  // nothing there: neither right is
      return is_write ? 0x5 : 0x6;
  }
}

// What a request may not do, whatever stage says so, and where it may not go.
uint8_t RequestReason(FaultCode code) {
  switch (code) {
    case FaultCode::kNotForUser:
      return 0x81;
    case FaultCode::kNoExecute:
      return 0x82;
    case FaultCode::kNoWrite:
      return 0x85;
    case FaultCode::kNoRead:
      return 0x86;
    default:
      return 0x87;  // kInterruptRange
  }
}

uint8_t FirstStageReason(const Fault& fault, unsigned levels) {
  switch (fault.code) {
    case FaultCode::kTableAccess:
      return fault.level + 1u == levels ? 0x73 : 0x70;
    case FaultCode::kBadRoot:
      return 0x73;
    case FaultCode::kNotPresent:
      return 0x71;
    case FaultCode::kReserved:
      return 0x72;
    case FaultCode::kInputRange:
      return 0x80;
    case FaultCode::kUpdateFailed:
      return 0x91;
    default:
      return RequestReason(fault.code);
  }
}

uint8_t SecondStageReason(FaultCode code) {
  switch (code) {
    case FaultCode::kTableAccess:
    case FaultCode::kUpdateFailed:
      return 0x78;
    case FaultCode::kNotPresent:
      return 0x79;
    case FaultCode::kReserved:
      return 0x7a;
    case FaultCode::kBadRoot:
      return 0x7b;
    case FaultCode::kInputRange:
      return 0x84;
    default:
      return RequestReason(code);
  }
}

// While a table of the first stage was read, or its accessed and dirty flags written.
uint8_t TableReason(const Fault& fault, unsigned first_levels) {
  switch (fault.code) {
    case FaultCode::kInputRange:
      return 0x74;
    case FaultCode::kNoRead:
      return fault.table_level + 1u == first_levels ? 0x75 : 0x76;
    case FaultCode::kNoWrite:
      return 0x77;
    default:
      return SecondStageReason(fault.code);
  }
}

}  // namespace

uint8_t VtdFaultReason(const Fault& fault, VtdMode mode, bool is_write, unsigned first_levels) {
  if (mode == VtdMode::kLegacy) return LegacyReason(fault.code, is_write);
  if (fault.stage == 1) return FirstStageReason(fault, first_levels);
  return fault.on_table ? TableReason(fault, first_levels) : SecondStageReason(fault.code);
}

}  // namespace mvgpu::domain
