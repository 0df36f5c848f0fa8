#pragma once

#include <memory>
#include <string>
#include <vector>

namespace mvgpu::domain {

// The system calls of VFIO and iommufd; each answers what the call does, or minus an errno.
class VfioKernel {
 public:
  virtual ~VfioKernel() = default;
  virtual int open(const std::string& path) = 0;  // for reading and writing
  virtual int ioctl(int fd, unsigned long request, void* argument) = 0;
  // Appends the names of what is in a folder; 0 when it could be read.
  virtual int list(const std::string& folder, std::vector<std::string>* names) = 0;
};

std::unique_ptr<VfioKernel> MakeVfioKernel();

}  // namespace mvgpu::domain
