#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/memory/guest_file.h"

namespace mvgpu::backend {

// What the kernel says of a process that may have assigned devices: which files of VFIO and iommufd
// it has open, and which files it maps so that others see what it writes. Everything comes from
// PROC/PID, and is what another process may want us to believe: bounded, and for people.
struct VfioProcess {
  // Pages of a file, by where they lie in it.
  struct Shared {
    domain::FileIdentity file;
    PageRun pages;
  };
  uint32_t pid = 0;
  std::string command;               // comm, printable
  std::vector<std::string> devices;  // paths of open devices and groups, sorted, each once
  bool has_type1 = false;            // /dev/vfio/vfio is open
  bool has_iommufd = false;          // /dev/iommu is open
  std::vector<Shared> shared;        // mapped shared and writable

  // How its devices reach memory: "vfio-type1" or "iommufd".
  std::string_view backend() const { return has_iommufd && !has_type1 ? "iommufd" : "vfio-type1"; }
  // Which pages of a file it maps, in order, neighbours as one.
  std::vector<PageRun> pages_of(const domain::FileIdentity& file) const;
};

// Errors: kNotMapped (no such process), kPermission (another user's), kSystem.
Result<VfioProcess> ReadVfioProcess(const std::string& proc, uint32_t pid);

}  // namespace mvgpu::backend
