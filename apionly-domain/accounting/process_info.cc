#include "apionly-domain/accounting/process_info.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <string>
#include <string_view>

#include "apionly-domain/base/unique_fd.h"

namespace mvgpu::domain {

namespace {

constexpr size_t kLongestProcFile = 64 * 1024;  // status lists groups and cpus

// Empty when the file cannot be read: the process has gone.
std::string ReadProcFile(const std::string& path) {
  std::string text;
  UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd.is_valid()) return text;
  char buffer[4096];
  while (text.size() < kLongestProcFile) {
    const ssize_t n = ::read(fd.get(), buffer, sizeof buffer);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) break;
    text.append(buffer, static_cast<size_t>(n));
  }
  return text;
}

struct StatLine {
  char state = 'X';
  uint64_t threads = 0;
  uint64_t start_time = 0;
};

// proc(5): pid (comm) state ppid ...; the name may hold anything, so count fields from the last
// ')'.
std::optional<StatLine> ReadStat(uint32_t pid) {
  const std::string text = ReadProcFile(fmt::format("/proc/{}/stat", pid));
  const size_t name_end = text.rfind(')');
  if (name_end == std::string::npos) return std::nullopt;
  StatLine line;
  size_t at = name_end + 1;
  for (int field = 3; field <= 22; ++field) {
    at = text.find_first_not_of(' ', at);
    if (at == std::string::npos) return std::nullopt;
    const size_t end = std::min(text.find(' ', at), text.size());
    if (field == 3) line.state = text[at];
    if (field == 20) std::from_chars(text.data() + at, text.data() + end, line.threads);
    if (field == 22) std::from_chars(text.data() + at, text.data() + end, line.start_time);
    at = end;
  }
  return line;
}

uint64_t OwnPidNamespace() {
  struct stat st = {};
  return ::stat("/proc/self/ns/pid", &st) == 0 ? st.st_ino : 0;
}

std::optional<uint64_t> KilobytesOf(std::string_view status, std::string_view key) {
  const size_t at = status.find(key);
  if (at == std::string_view::npos) return std::nullopt;
  std::string_view rest = status.substr(at + key.size());
  rest.remove_prefix(std::min(rest.find_first_not_of(" \t"), rest.size()));
  uint64_t value = 0;
  const auto parsed = std::from_chars(rest.data(), rest.data() + rest.size(), value);
  if (parsed.ec != std::errc()) return std::nullopt;
  return value;
}

}  // namespace

Result<ProcessId> CurrentProcess() {
  const auto pid = static_cast<uint32_t>(::getpid());
  const std::optional<StatLine> stat = ReadStat(pid);
  if (!stat) {
    return FailSystem(ENOENT, fmt::format("cannot read /proc/{}/stat; mount /proc", pid));
  }
  return ProcessId{pid, stat->start_time, OwnPidNamespace()};
}

Result<ProcessId> FindProcess(uint32_t pid) {
  const uint64_t own_namespace = OwnPidNamespace();
  if (own_namespace == 0) return FailSystem(ENOENT, "cannot read /proc/self/ns/pid; mount /proc");
  const std::optional<StatLine> stat = ReadStat(pid);
  if (!stat) {
    return Fail(ErrorCode::kNotMapped, fmt::format("there is no process {} here", pid));
  }
  return ProcessId{pid, stat->start_time, own_namespace};
}

Liveness LivenessOf(const ProcessId& process) {
  const uint64_t own_namespace = OwnPidNamespace();
  if (own_namespace == 0 || own_namespace != process.pid_namespace) return Liveness::kUnknown;
  const std::optional<StatLine> stat = ReadStat(process.pid);
  if (!stat || stat->start_time != process.start_time) return Liveness::kDead;
  // A first thread that left before the others is a zombie in a living process.
  const bool is_zombie = stat->state == 'Z' || stat->state == 'X' || stat->state == 'x';
  return is_zombie && stat->threads <= 1 ? Liveness::kDead : Liveness::kAlive;
}

std::optional<KernelCounters> KernelCountersOf(const ProcessId& process, const std::string& proc) {
  const std::string status = ReadProcFile(fmt::format("{}/{}/status", proc, process.pid));
  const auto vm_lck = KilobytesOf(status, "\nVmLck:");
  const auto vm_pin = KilobytesOf(status, "\nVmPin:");
  // Asked after the read: the numbers are of this process and not of a successor.
  if (!vm_lck || !vm_pin || LivenessOf(process) != Liveness::kAlive) return std::nullopt;
  return KernelCounters{*vm_lck, *vm_pin};
}

std::string_view KernelCounterName(std::string_view pin_backend) {
  if (pin_backend == "mlock" || pin_backend == "vfio-type1") return "VmLck";
  if (pin_backend == "io-uring" || pin_backend == "iommufd") return "VmPin";
  return {};
}

}  // namespace mvgpu::domain
