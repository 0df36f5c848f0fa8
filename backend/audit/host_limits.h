#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "backend/audit/memlock_plan.h"

namespace mvgpu::backend {

// What of this process's limits, which what it starts inherits, and of this system stands in the
// way of a plan.
struct HostLimits {
  struct Check {
    std::string what;                 // "RLIMIT_MEMLOCK, VMM"
    std::optional<uint64_t> current;  // nullopt: no limit
    uint64_t needed = 0;
    bool enough = false;
    std::string message;  // one line: object, values and, when it is not enough, the remedy
  };

  std::vector<Check> checks;
  // The kernel then compares only vDPA's and what others pin for this process with the limit.
  bool has_ipc_lock = false;

  bool enough() const;
};

HostLimits CheckHost(const MemlockRequest& request, const MemlockPlan& plan);

}  // namespace mvgpu::backend
