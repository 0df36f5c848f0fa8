#pragma once

#include <fcntl.h>
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "apionly-domain/assigned/iommufd_uapi.h"
#include "apionly-domain/assigned/vfio_kernel.h"
#include "apionly-domain/base/address.h"

namespace mvgpu::testing {

// iommufd and the file of one VFIO device, "0000:00:05.0", as the kernel answers (Linux 6.12,
// drivers/iommu/iommufd/{main,ioas,io_pagetable}.c, drivers/vfio/device_cdev.c): each field is
// looked at, and what is mapped is kept, pinned and counted. The state outlives it.
class FakeIommufdKernel final : public domain::VfioKernel {
 public:
  static constexpr char kDevice[] = "0000:00:05.0";
  struct Area {
    uint64_t length;
    uint64_t user_va;
    uint32_t flags;
  };
  struct State {
    // Of the device's IOMMU; before it is attached anything goes.
    std::vector<domain::uapi::IovaRangeRecord> ranges = {{0, 0xfedfffff},
                                                         {0xfef00000, (1ull << 39) - 1}};
    uint64_t alignment = 4096;
    uint64_t limit_pages = UINT64_MAX;  // that the user may have pinned
    bool always_more_ranges = false;
    std::map<std::string, std::vector<std::string>> folders = {
        {"/sys/bus/pci/devices/0000:00:05.0", {"config", "vfio-dev"}},
        {"/sys/bus/pci/devices/0000:00:05.0/vfio-dev", {"vfio3"}}};
    std::map<std::string, int> open_errno;     // by path
    std::map<unsigned long, int> ioctl_errno;  // by request

    std::map<uint32_t, std::map<uint64_t, Area>> address_spaces;  // by id, then by IOVA
    bool is_bound = false;
    uint32_t attached = 0;  // address space that the device sees
    uint32_t next_id = 1;
    std::vector<unsigned long> requests;  // that succeeded

    // VmPin: what is mapped for a device is pinned, mapping by mapping.
    uint64_t pinned_pages() const {
      uint64_t pages = 0;
      if (attached == 0) return 0;
      for (const auto& [iova, area] : address_spaces.at(attached)) pages += PagesIn(area.length);
      return pages;
    }
  };
  explicit FakeIommufdKernel(std::shared_ptr<State> state) : state_(std::move(state)) {}

  int open(const std::string& path) override {
    if (const auto it = state_->open_errno.find(path); it != state_->open_errno.end())
      return -it->second;
    if (path != "/dev/iommu" && path != "/dev/vfio/devices/vfio3") return -ENOENT;
    int& fd = path == "/dev/iommu" ? iommufd_ : device_;
    fd = memfd_create("iommufd", MFD_CLOEXEC);
    return fd;
  }
  int list(const std::string& folder, std::vector<std::string>* names) override {
    const auto found = state_->folders.find(folder);
    if (found == state_->folders.end()) return -ENOENT;
    names->insert(names->end(), found->second.begin(), found->second.end());
    return 0;
  }
  int ioctl(int fd, unsigned long request, void* argument) override {
    if (fcntl(fd, F_GETFD) < 0) return -EBADF;
    if (const auto it = state_->ioctl_errno.find(request); it != state_->ioctl_errno.end())
      return -it->second;
    const int done = fd == device_ ? OfDevice(request, argument) : OfIommufd(request, argument);
    if (done == 0) state_->requests.push_back(request);
    return done;
  }

 private:
  int OfIommufd(unsigned long request, void* argument) {
    switch (request) {
      case domain::uapi::kIommuDestroy:
        return Call<domain::uapi::IommuDestroy>(argument, &FakeIommufdKernel::Destroy);
      case domain::uapi::kIoasAlloc:
        return Call<domain::uapi::IoasAlloc>(argument, &FakeIommufdKernel::Alloc);
      case domain::uapi::kIoasIovaRanges:
        return Call<domain::uapi::IoasIovaRanges>(argument, &FakeIommufdKernel::Ranges);
      case domain::uapi::kIoasMap:
        return Call<domain::uapi::IoasMap>(argument, &FakeIommufdKernel::Map);
      case domain::uapi::kIoasUnmap:
        return Call<domain::uapi::IoasUnmap>(argument, &FakeIommufdKernel::Unmap);
      default:
        return -ENOTTY;
    }
  }
  // A newer caller's structure is fine as long as what is not known here is 0. Answers are written
  // whatever the outcome is, which only RANGES makes use of.
  template <typename T>
  int Call(void* argument, int (FakeIommufdKernel::*execute)(T&)) {
    T request = {};
    uint32_t size = 0;
    std::memcpy(&size, argument, sizeof(size));
    if (size < sizeof(T)) return -EINVAL;
    const auto* bytes = static_cast<const uint8_t*>(argument);
    if (std::any_of(bytes + sizeof(T), bytes + size, [](uint8_t byte) { return byte != 0; }))
      return -E2BIG;
    std::memcpy(&request, argument, sizeof(T));
    const int done = (this->*execute)(request);
    std::memcpy(argument, &request, sizeof(T));
    return done;
  }

  int Destroy(domain::uapi::IommuDestroy& request) {
    if (!state_->address_spaces.contains(request.id)) return -ENOENT;
    if (state_->attached == request.id) return -EBUSY;
    state_->address_spaces.erase(request.id);
    return 0;
  }
  int Alloc(domain::uapi::IoasAlloc& request) {
    if (request.flags != 0) return -EOPNOTSUPP;
    request.out_ioas_id = state_->next_id++;
    state_->address_spaces[request.out_ioas_id];
    return 0;
  }
  std::vector<domain::uapi::IovaRangeRecord> RangesOf(uint32_t id) const {
    if (state_->attached == id) return state_->ranges;
    return {{0, UINT64_MAX}};
  }
  int Ranges(domain::uapi::IoasIovaRanges& request) {
    if (request.reserved != 0) return -EOPNOTSUPP;
    if (!state_->address_spaces.contains(request.ioas_id)) return -ENOENT;
    const auto ranges = RangesOf(request.ioas_id);
    const size_t room = request.num_iovas;
    std::memcpy(std::bit_cast<void*>(request.allowed_iovas), ranges.data(),
                std::min(room, ranges.size()) * sizeof(ranges[0]));
    request.num_iovas = static_cast<uint32_t>(ranges.size());
    request.out_iova_alignment = state_->alignment;
    if (state_->always_more_ranges) return -EMSGSIZE;
    return ranges.size() > room ? -EMSGSIZE : 0;
  }

  int Map(domain::uapi::IoasMap& request) {
    using namespace domain::uapi;
    constexpr uint32_t kAccess = kIoasMapReadable | kIoasMapWriteable;
    if ((request.flags & ~(kIoasMapFixedIova | kAccess)) != 0 || request.reserved != 0)
      return -EOPNOTSUPP;
    if (request.iova == UINT64_MAX || request.length == UINT64_MAX) return -EOVERFLOW;
    if ((request.flags & kAccess) == 0) return -EINVAL;
    const auto space = state_->address_spaces.find(request.ioas_id);
    if (space == state_->address_spaces.end()) return -ENOENT;
    if ((request.flags & kIoasMapFixedIova) == 0) request.iova = uint64_t{1} << 38;
    if (const int refused = CheckIova(space->first, request); refused != 0) return refused;
    if (!IsThere(request.user_va, request.length)) return -EFAULT;
    const uint64_t pages = state_->attached == space->first ? PagesIn(request.length) : 0;
    if (state_->pinned_pages() + pages > state_->limit_pages) return -ENOMEM;
    space->second[request.iova] = {request.length, request.user_va, request.flags};
    return 0;
  }
  int CheckIova(uint32_t id, const domain::uapi::IoasMap& request) const {
    const uint64_t rest = state_->alignment - 1;
    if (request.length == 0 || (request.length & rest) != 0 || (request.iova & rest) != 0)
      return -EINVAL;
    const uint64_t last = request.iova + request.length - 1;
    if (last < request.iova) return -EOVERFLOW;
    const auto ranges = RangesOf(id);
    const bool is_allowed = std::any_of(ranges.begin(), ranges.end(), [&](const auto& range) {
      return range.start <= request.iova && last <= range.last;
    });
    if (!is_allowed) return -EINVAL;
    for (const auto& [iova, area] : state_->address_spaces.at(id)) {
      if (iova <= last && request.iova < iova + area.length) return -EEXIST;
    }
    return 0;
  }
  static bool IsThere(uint64_t user_va, uint64_t length) {
    std::vector<unsigned char> residency(PagesIn(length));
    return mincore(std::bit_cast<void*>(user_va), length, residency.data()) == 0;
  }
  int Unmap(domain::uapi::IoasUnmap& request) {
    const auto space = state_->address_spaces.find(request.ioas_id);
    if (space == state_->address_spaces.end()) return -ENOENT;
    if (request.iova == UINT64_MAX || request.length == UINT64_MAX) return -EOVERFLOW;
    if (request.length == 0) return -EINVAL;
    const uint64_t last = request.iova + request.length - 1;
    if (last < request.iova) return -EOVERFLOW;
    uint64_t unmapped = 0;
    for (auto it = space->second.begin(); it != space->second.end();) {
      const uint64_t area_last = it->first + it->second.length - 1;
      if (it->first > last || area_last < request.iova) {
        ++it;
        continue;
      }
      if (it->first < request.iova || area_last > last) return -ENOENT;
      unmapped += it->second.length;
      it = space->second.erase(it);
    }
    request.length = unmapped;
    return unmapped == 0 ? -ENOENT : 0;
  }

  int OfDevice(unsigned long request, void* argument) {
    if (request == domain::uapi::kDeviceBindIommufd) return Bind(argument);
    if (!state_->is_bound) return -EINVAL;
    if (request == domain::uapi::kDeviceAttachPt) return Attach(argument);
    if (request == domain::uapi::kDeviceDetachPt) return Detach(argument);
    return -ENOTTY;
  }
  int Bind(void* argument) {
    domain::uapi::DeviceBindIommufd bind;
    std::memcpy(&bind, argument, sizeof(bind));
    if (bind.argsz < sizeof(bind) || bind.flags != 0 || bind.iommufd < 0) return -EINVAL;
    if (state_->is_bound) return -EINVAL;
    if (bind.iommufd != iommufd_) return -EBADFD;
    state_->is_bound = true;
    bind.out_devid = state_->next_id++;
    std::memcpy(argument, &bind, sizeof(bind));
    return 0;
  }
  int Attach(void* argument) {
    domain::uapi::DeviceAttachPt attach;
    std::memcpy(&attach, argument, sizeof(attach));
    if (attach.argsz < sizeof(attach) || attach.flags != 0) return -EINVAL;
    if (!state_->address_spaces.contains(attach.pt_id)) return -ENOENT;
    state_->attached = attach.pt_id;
    attach.pt_id = state_->next_id++;  // the page table that is made for it
    std::memcpy(argument, &attach, sizeof(attach));
    return 0;
  }
  int Detach(void* argument) {
    domain::uapi::DeviceDetachPt detach;
    std::memcpy(&detach, argument, sizeof(detach));
    if (detach.argsz < sizeof(detach) || detach.flags != 0) return -EINVAL;
    state_->attached = 0;
    return 0;
  }

  const std::shared_ptr<State> state_;
  int iommufd_ = -1;
  int device_ = -1;
};

}  // namespace mvgpu::testing
