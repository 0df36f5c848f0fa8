#include "backend/audit/host_limits.h"

#include <fmt/format.h>
#include <linux/capability.h>
#include <sys/resource.h>
#include <sys/sysinfo.h>

#include <algorithm>
#include <fstream>
#include <utility>

#include "backend/audit/console.h"

namespace mvgpu::backend {

namespace {

using Process = MemlockPlan::Process;

std::optional<uint64_t> LimitOf(rlim_t limit) {
  return limit == RLIM_INFINITY ? std::nullopt : std::optional<uint64_t>(limit);
}

std::string LimitText(std::optional<uint64_t> limit) {
  return limit ? SizeText(*limit) : "unlimited";
}

HostLimits::Check CheckMemlock(const MemlockPlan::Limit& limit) {
  struct rlimit ours = {};
  getrlimit(RLIMIT_MEMLOCK, &ours);  // cannot fail with these arguments
  const auto soft = LimitOf(ours.rlim_cur);
  const auto hard = LimitOf(ours.rlim_max);
  HostLimits::Check check{fmt::format("RLIMIT_MEMLOCK, {}", ProcessName(limit.process)),
                          soft,
                          limit.bytes,
                          !soft || *soft >= limit.bytes,
                          {}};
  check.message =
      fmt::format("{}: {}, {} needed", check.what, LimitText(soft), SizeText(limit.bytes));
  if (check.enough) return check;
  check.message += !hard || *hard >= limit.bytes
                       ? fmt::format("; ulimit -l {}", (limit.bytes + 1023) / 1024)
                       : fmt::format("; hard limit {}, see snippets", LimitText(hard));
  return check;
}

HostLimits::Check CheckMemory(const MemlockPlan& plan) {
  struct sysinfo info = {};
  sysinfo(&info);
  const uint64_t total = uint64_t{info.totalram} * info.mem_unit;
  const uint64_t needed = plan.shared.bytes.value_or(0);
  HostLimits::Check check{"memory of the host", total, needed, total >= needed, {}};
  check.message =
      fmt::format("{}: {} MiB, {} MiB may be held", check.what, total >> 20, needed >> 20);
  if (!check.enough) check.message += "; give the VM less";
  return check;
}

// nullopt where the kernel has no such setting: io_uring is then allowed.
std::optional<HostLimits::Check> CheckIoUring() {
  std::ifstream file("/proc/sys/kernel/io_uring_disabled");
  uint64_t disabled = 0;
  if (!(file >> disabled)) return std::nullopt;
  HostLimits::Check check{"kernel.io_uring_disabled", disabled, 0, disabled == 0, {}};
  check.message = fmt::format("{}: {}, 0 needed", check.what, disabled);
  if (!check.enough) {
    check.message += "; sysctl kernel.io_uring_disabled=0, or --vgpu-pin=mlock";
  }
  return check;
}

bool HasIpcLock() {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;) {
    uint64_t capabilities = 0;
    if (word == "CapEff:" && status >> std::hex >> capabilities) {
      return (capabilities >> CAP_IPC_LOCK & 1) != 0;
    }
  }
  return false;
}

}  // namespace

bool HostLimits::enough() const {
  return std::all_of(checks.begin(), checks.end(), [](const Check& check) { return check.enough; });
}

HostLimits CheckHost(const MemlockRequest& request, const MemlockPlan& plan) {
  HostLimits host;
  for (const MemlockPlan::Limit& limit : plan.limits) host.checks.push_back(CheckMemlock(limit));
  if (plan.shared.bytes.value_or(0) > 0) host.checks.push_back(CheckMemory(plan));
  if (request.count(DeviceKind::kVgpu) > 0 && request.vgpu_pin == PinMode::kIoUring) {
    if (auto check = CheckIoUring()) host.checks.push_back(*std::move(check));
  }
  host.has_ipc_lock = HasIpcLock();
  return host;
}

}  // namespace mvgpu::backend
