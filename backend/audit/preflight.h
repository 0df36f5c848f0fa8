#pragma once

#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "backend/audit/host_limits.h"
#include "backend/audit/limit_snippets.h"
#include "backend/audit/memlock_plan.h"

namespace CLI {
class App;
}

namespace mvgpu::backend {

// `mvgpu-audit preflight`: the limit of locked memory that a VM will need, and whether it is there.
struct PreflightOptions {
  MemlockRequest request;
  std::vector<std::string> devices;  // as written
  bool json = false;

  // Adds the verb. This must outlive the parsing.
  CLI::App* add_to(CLI::App& app);
};

// The exit code: kAuditOk, kAuditProblem when something is not enough, kAuditUsage.
int Preflight(PreflightOptions options);

struct PreflightReport {
  MemlockRequest request;
  MemlockPlan plan;
  HostLimits host;
  LimitSnippets snippets;
};

// For people: at most 100 columns, ends with a newline.
std::string RenderText(const PreflightReport& report);

// For programs. Fields are only ever added. n is a number of bytes unless something else is said.
//   {"memory_bytes": n, "devices": {kind: count}, "viommu": bool, "locked": bool,
//    "iommufd_per_process": bool, "vgpu_pin": str, "vgpu_pin_limit_bytes": n or null (no limit),
//    "charges": [{"process": "VMM|backend", "counter": "VmLck|VmPin|user", "bytes": n,
//                 "why": str}],
//    "limits": [{"process": str, "processes": count, "bytes": n (of each), "why": str}],
//    "shared": {"bytes": n, "why": str}, "libvirt": {"bytes": n or null (unlimited), "why": str},
//    "hot_plug": {"bytes": n, "why": str} (of the VMM, with one vfio device more),
//    "host": {"enough": bool, "has_ipc_lock": bool,
//             "checks": [{"what": str, "current": n or null (unlimited), "needed": n,
//                         "enough": bool, "message": str}]},
//    "snippets": {"systemd": str, "libvirt": str, "kubevirt": str}}
nlohmann::json ToJson(const PreflightReport& report);

}  // namespace mvgpu::backend
