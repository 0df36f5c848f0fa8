#pragma once

#include <memory>
#include <string>

namespace mvgpu::domain {

// The system calls of VFIO; each answers what the call does, or minus an errno.
class VfioKernel {
 public:
  virtual ~VfioKernel() = default;
  virtual int open(const std::string& path) = 0;  // for reading and writing
  virtual int ioctl(int fd, unsigned long request, void* argument) = 0;
};

std::unique_ptr<VfioKernel> MakeVfioKernel();

}  // namespace mvgpu::domain
