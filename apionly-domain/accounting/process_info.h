#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "apionly-domain/base/error.h"

namespace mvgpu::domain {

// A process, told apart from a later one with the same number.
struct ProcessId {
  uint32_t pid = 0;
  uint64_t start_time = 0;     // clock ticks since boot, field 22 of /proc/PID/stat
  uint64_t pid_namespace = 0;  // in which `pid` means something; 0: unknown

  bool operator==(const ProcessId&) const = default;
};

// Errors: kSystem when /proc is not there.
Result<ProcessId> CurrentProcess();

// Errors: kNotMapped (no such process), kSystem when /proc is not there.
Result<ProcessId> FindProcess(uint32_t pid);

// kUnknown: the process is of another pid namespace, so its number says nothing here.
enum class Liveness : uint8_t { kAlive, kDead, kUnknown };
// A zombie is dead: it will never run again.
Liveness LivenessOf(const ProcessId& process);

// What the kernel counts for a process (facts of PROC/PID/status).
struct KernelCounters {
  uint64_t vm_lck_kb = 0;  // locked_vm: mlock, VFIO type1
  uint64_t vm_pin_kb = 0;  // pinned_vm: io_uring, iommufd, RDMA, vDPA
};
// nullopt when the process is not alive or not ours to look at.
std::optional<KernelCounters> KernelCountersOf(const ProcessId& process,
                                               const std::string& proc = "/proc");
// Which of them counts what a row of the ledger has locked, by the row's pin back end ("mlock",
// "vfio-type1": "VmLck"; "io-uring", "iommufd": "VmPin"). Empty where the kernel is not asked to
// hold anything.
std::string_view KernelCounterName(std::string_view pin_backend);

}  // namespace mvgpu::domain
