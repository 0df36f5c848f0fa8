#include "backend/audit/vfio_process.h"

#include <dirent.h>
#include <fmt/format.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <fstream>
#include <memory>
#include <utility>

namespace mvgpu::backend {

namespace {

// A process may have a million descriptors and 65530 memory areas by default.
constexpr size_t kMostLines = 1u << 20;

tl::unexpected<Error> CannotRead(int error, const std::string& path, uint32_t pid) {
  if (error == ENOENT || error == ESRCH) {
    return Fail(ErrorCode::kNotMapped, fmt::format("there is no process {} ({})", pid, path));
  }
  if (error == EACCES || error == EPERM) {
    return Fail(ErrorCode::kPermission,
                fmt::format("process {} may not be looked at by user {} ({}); run this as its user "
                            "or as root",
                            pid, ::geteuid(), path));
  }
  return FailSystem(error, fmt::format("cannot read {}", path));
}

// Where the links of a process's descriptors lead. Files of VFIO are recognised by the names that
// the kernel gives them: /dev/vfio/vfio (a type1 container), /dev/vfio/12 (a group),
// /dev/vfio/devices/vfio3 and anon_inode:[vfio-device] (a device), /dev/iommu.
Result<void> ReadDescriptors(const std::string& proc, VfioProcess& process) {
  const std::string path = fmt::format("{}/{}/fd", proc, process.pid);
  const std::unique_ptr<DIR, int (*)(DIR*)> dir(::opendir(path.c_str()), &::closedir);
  if (dir == nullptr) return CannotRead(errno, path, process.pid);
  size_t lines = 0;
  while (const dirent* entry = ::readdir(dir.get())) {
    if (++lines > kMostLines) break;
    std::array<char, 256> target;
    const ssize_t size =
        ::readlinkat(::dirfd(dir.get()), entry->d_name, target.data(), target.size());
    if (size <= 0) continue;  // closed meanwhile, or no link
    const std::string_view name(target.data(), static_cast<size_t>(size));
    if (name == "/dev/iommu") process.has_iommufd = true;
    if (name == "/dev/vfio/vfio") {
      process.has_type1 = true;
    } else if (name.starts_with("/dev/vfio/") || name == "anon_inode:[vfio-device]") {
      process.devices.emplace_back(name);
    }
  }
  std::sort(process.devices.begin(), process.devices.end());
  process.devices.erase(std::unique(process.devices.begin(), process.devices.end()),
                        process.devices.end());
  return {};
}

// proc(5): address perms offset major:minor inode path.
Result<void> ReadMaps(const std::string& proc, VfioProcess& process) {
  const std::string path = fmt::format("{}/{}/maps", proc, process.pid);
  errno = 0;
  std::ifstream maps(path);
  if (!maps.is_open()) return CannotRead(errno, path, process.pid);
  size_t lines = 0;
  for (std::string line; std::getline(maps, line) && ++lines <= kMostLines;) {
    uint64_t start = 0;
    uint64_t end = 0;
    std::array<char, 5> rights = {};
    uint64_t offset = 0;
    unsigned major = 0;
    unsigned minor = 0;
    uint64_t inode = 0;
    const int fields =
        std::sscanf(line.c_str(), "%" SCNx64 "-%" SCNx64 " %4s %" SCNx64 " %x:%x %" SCNu64, &start,
                    &end, rights.data(), &offset, &major, &minor, &inode);
    if (fields != 7 || inode == 0 || end <= start || rights[1] != 'w' || rights[3] != 's') continue;
    process.shared.push_back(
        {{makedev(major, minor), inode}, {PagesIn(offset), PagesIn(end - start)}});
  }
  if (maps.bad()) return CannotRead(errno, path, process.pid);
  return {};
}

std::string CommandOf(const std::string& proc, uint32_t pid) {
  std::ifstream file(fmt::format("{}/{}/comm", proc, pid));
  std::string command;
  std::getline(file, command);
  command.resize(std::min<size_t>(command.size(), 15));
  for (char& c : command) {
    if (c < 0x20 || c > 0x7e) c = '?';
  }
  return command.empty() ? fmt::format("process-{}", pid) : command;
}

}  // namespace

std::vector<PageRun> VfioProcess::pages_of(const domain::FileIdentity& file) const {
  std::vector<PageRun> runs;
  for (const Shared& part : shared) {
    // What wraps is no part of a file.
    if (part.file == file && CheckedAdd(part.pages.first, part.pages.count)) {
      runs.push_back(part.pages);
    }
  }
  std::sort(runs.begin(), runs.end(),
            [](const PageRun& a, const PageRun& b) { return a.first < b.first; });
  std::vector<PageRun> merged;
  for (const PageRun& run : runs) {
    if (merged.empty() || run.first > merged.back().end()) {
      merged.push_back(run);
    } else {
      merged.back().count = std::max(merged.back().end(), run.end()) - merged.back().first;
    }
  }
  return merged;
}

Result<VfioProcess> ReadVfioProcess(const std::string& proc, uint32_t pid) {
  VfioProcess process;
  process.pid = pid;
  MVGPU_RETURN_IF_ERROR(ReadDescriptors(proc, process));
  MVGPU_RETURN_IF_ERROR(ReadMaps(proc, process));
  process.command = CommandOf(proc, pid);
  return process;
}

}  // namespace mvgpu::backend
