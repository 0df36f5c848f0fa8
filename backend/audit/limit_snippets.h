#pragma once

#include <string>

#include "backend/audit/memlock_plan.h"

namespace mvgpu::backend {

// The limits of a plan, ready to be pasted. Each is a comment alone where there is nothing to set.
struct LimitSnippets {
  std::string systemd;   // drop-ins of the units that start the processes
  std::string libvirt;   // inside <domain>
  std::string kubevirt;  // inside a VirtualMachineInstance
};

LimitSnippets MakeSnippets(const MemlockRequest& request, const MemlockPlan& plan);

}  // namespace mvgpu::backend
