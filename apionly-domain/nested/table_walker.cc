#include "apionly-domain/nested/table_walker.h"

#include <fmt/format.h>

namespace mvgpu::domain {

std::string_view FaultCodeName(FaultCode code) {
  switch (code) {
    case FaultCode::kNotPresent:
      return "not present";
    case FaultCode::kTableAccess:
      return "table not accessible";
    case FaultCode::kBadRoot:
      return "bad root pointer";
    case FaultCode::kReserved:
      return "reserved bits";
    case FaultCode::kNullEntry:
      return "null entry";
    case FaultCode::kTableLength:
      return "bad table length";
    case FaultCode::kTableType:
      return "bad table type";
    case FaultCode::kInputRange:
      return "address out of range";
    case FaultCode::kOutputRange:
      return "entry points out of range";
    case FaultCode::kInterruptRange:
      return "interrupt range";
    case FaultCode::kAccessFlag:
      return "access flag is clear";
    case FaultCode::kNoRead:
      return "no read permission";
    case FaultCode::kNoWrite:
      return "no write permission";
    case FaultCode::kNoExecute:
      return "no execute permission";
    case FaultCode::kNotForUser:
      return "not for user requests";
    case FaultCode::kUpdateFailed:
      return "accessed or dirty flag not set";
  }
  return "unknown";
}

std::string Fault::ToString() const {
  return fmt::format("{} at {:#x}, stage {} level {}{}, for device address {:#x}",
                     FaultCodeName(code), address, stage, level,
                     on_table ? " (for a table of stage 1)" : "", device_address);
}

}  // namespace mvgpu::domain
