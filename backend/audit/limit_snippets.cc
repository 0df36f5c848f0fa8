#include "backend/audit/limit_snippets.h"

#include <fmt/format.h>

#include <array>

namespace mvgpu::backend {

namespace {

using Process = MemlockPlan::Process;

// systemd takes bytes. (Its K, M, G are powers of 1024.)
std::string Systemd(const MemlockPlan& plan) {
  std::string text;
  for (const MemlockPlan::Limit& limit : plan.limits) {
    text += fmt::format("# unit of {}\n[Service]\nLimitMEMLOCK={}\n",
                        limit.process == Process::kVmm ? "the VMM" : "mvgpu-backend", limit.bytes);
  }
  return text.empty() ? "# nothing to set: no process locks memory\n" : text;
}

// Where <hard_limit> is there, libvirt takes it as it is. It is the cgroup's limit as well.
std::string Libvirt(const MemlockPlan& plan) {
  const MemlockPlan::Limit* const vmm = plan.limit_of(Process::kVmm);
  if (vmm == nullptr) return "<!-- nothing to set: no device in the VMM locks memory -->\n";
  return fmt::format(
      "<!-- also limits the memory that QEMU may use: add what it needs beside the guest's -->\n"
      "<memtune>\n"
      "  <hard_limit unit='KiB'>{}</hard_limit>\n"
      "</memtune>\n",
      (vmm->bytes + 1023) / 1024);
}

// A Kubernetes quantity: bytes in the largest binary unit that gives a whole number.
std::string Quantity(uint64_t bytes) {
  static constexpr std::array kUnits = {"", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"};
  size_t unit = 0;
  for (; bytes != 0 && bytes % 1024 == 0; bytes /= 1024) ++unit;
  return fmt::format("{}{}", bytes, kUnits[unit]);
}

// KubeVirt's limit is guest memory + overhead; the overhead is added to what the pod requests.
// Whatever locks memory in the VMM locks all of the guest's, so the difference is never negative.
std::string Kubevirt(const MemlockRequest& request, const MemlockPlan& plan) {
  const MemlockPlan::Limit* const vmm = plan.limit_of(Process::kVmm);
  std::string text = "# nothing to set: no device in the VMM locks memory\n";
  if (vmm != nullptr) {
    text = fmt::format(
        "# feature gate ReservedOverheadMemlock; the pod requests the overhead as memory, too\n"
        "spec:\n"
        "  domain:\n"
        "    memory:\n"
        "      guest: {}\n"
        "      reservedOverhead:\n"
        "        addedOverhead: {}\n"
        "        memLock: Required\n",
        Quantity(request.memory_bytes), Quantity(vmm->bytes - request.memory_bytes));
  }
  if (const auto* const backend = plan.limit_of(Process::kBackend)) {
    text += fmt::format(
        "# mvgpu-backend's container has the limit of the container runtime's unit:\n"
        "# LimitMEMLOCK={} or more\n",
        backend->bytes);
  }
  return text;
}

}  // namespace

LimitSnippets MakeSnippets(const MemlockRequest& request, const MemlockPlan& plan) {
  return {Systemd(plan), Libvirt(plan), Kubevirt(request, plan)};
}

}  // namespace mvgpu::backend
