#include "apionly-domain/assigned/vfio_kernel.h"

#include <fcntl.h>
#include <sys/ioctl.h>

#include <cerrno>

namespace mvgpu::domain {

namespace {

class RealVfioKernel final : public VfioKernel {
 public:
  int open(const std::string& path) override {
    const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
    return fd >= 0 ? fd : -errno;
  }
  int ioctl(int fd, unsigned long request, void* argument) override {
    const int answer = ::ioctl(fd, request, argument);
    return answer >= 0 ? answer : -errno;
  }
};

}  // namespace

std::unique_ptr<VfioKernel> MakeVfioKernel() { return std::make_unique<RealVfioKernel>(); }

}  // namespace mvgpu::domain
