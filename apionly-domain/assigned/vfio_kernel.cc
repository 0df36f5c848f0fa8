#include "apionly-domain/assigned/vfio_kernel.h"

#include <fcntl.h>
#include <sys/ioctl.h>

#include <cerrno>
#include <filesystem>
#include <system_error>

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
  int list(const std::string& folder, std::vector<std::string>* names) override {
    std::error_code error;
    auto entry = std::filesystem::directory_iterator(folder, error);
    for (; !error && entry != std::filesystem::directory_iterator(); entry.increment(error)) {
      names->push_back(entry->path().filename());
    }
    return -error.value();
  }
};

}  // namespace

std::unique_ptr<VfioKernel> MakeVfioKernel() { return std::make_unique<RealVfioKernel>(); }

}  // namespace mvgpu::domain
