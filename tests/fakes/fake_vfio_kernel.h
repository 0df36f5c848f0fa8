#pragma once

#include <linux/vfio.h>
#include <sys/mman.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "apionly-domain/assigned/vfio_kernel.h"

namespace mvgpu::testing {

// VFIO as the kernel answers: one group, "7", in a type1 v2 container. Keeps what is mapped as the
// kernel does (no overlap, no cut), and can be told what to answer. The state outlives it.
class FakeVfioKernel final : public domain::VfioKernel {
 public:
  struct Mapping {
    uint64_t size;
    uint64_t vaddr;
    uint32_t flags;
  };
  struct State {
    std::map<uint64_t, Mapping> mappings;  // by IOVA
    std::vector<vfio_iova_range> ranges = {{0, 0xfedfffff}, {0xfef00000, (1ull << 39) - 1}};
    uint32_t entry_limit = 65535;
    bool has_caps = true;
    bool is_viable = true;
    int api_version = 0;
    std::map<std::string, int> open_errno;     // by path
    std::map<unsigned long, int> ioctl_errno;  // by request
    std::string opened_device;
  };
  explicit FakeVfioKernel(std::shared_ptr<State> state) : state_(std::move(state)) {}

  int open(const std::string& path) override {
    if (const auto it = state_->open_errno.find(path); it != state_->open_errno.end())
      return -it->second;
    if (path != "/dev/vfio/vfio" && path != "/dev/vfio/7") return -ENOENT;
    return memfd_create("vfio", MFD_CLOEXEC);
  }
  int ioctl(int, unsigned long request, void* argument) override {
    if (const auto it = state_->ioctl_errno.find(request); it != state_->ioctl_errno.end())
      return -it->second;
    switch (request) {
      case VFIO_GET_API_VERSION:
        return state_->api_version;
      case VFIO_CHECK_EXTENSION:
        return reinterpret_cast<uintptr_t>(argument) == VFIO_TYPE1v2_IOMMU ? 1 : 0;
      case VFIO_GROUP_GET_STATUS:
        static_cast<vfio_group_status*>(argument)->flags =
            state_->is_viable ? VFIO_GROUP_FLAGS_VIABLE : 0;
        return 0;
      case VFIO_GROUP_SET_CONTAINER:
      case VFIO_SET_IOMMU:
        return 0;
      case VFIO_GROUP_GET_DEVICE_FD:
        state_->opened_device = static_cast<const char*>(argument);
        return memfd_create("device", MFD_CLOEXEC);
      case VFIO_IOMMU_GET_INFO:
        return GetInfo(argument);
      case VFIO_IOMMU_MAP_DMA:
        return Map(*static_cast<vfio_iommu_type1_dma_map*>(argument));
      case VFIO_IOMMU_UNMAP_DMA:
        return Unmap(*static_cast<vfio_iommu_type1_dma_unmap*>(argument));
      default:
        return -ENOTTY;
    }
  }
  int list(const std::string&, std::vector<std::string>*) override { return -ENOENT; }

 private:
  // As the kernel: page sizes always, capabilities only where they all fit in.
  int GetInfo(void* argument) {
    std::vector<uint8_t> answer(sizeof(vfio_iommu_type1_info));
    vfio_iommu_type1_info head = {};
    const uint32_t argsz = static_cast<const vfio_iommu_type1_info*>(argument)->argsz;
    head.flags = VFIO_IOMMU_INFO_PGSIZES;
    head.iova_pgsizes = 1ull << 12 | 1ull << 21 | 1ull << 30;
    if (state_->has_caps) AppendCaps(&answer);
    head.argsz = static_cast<uint32_t>(answer.size());
    if (state_->has_caps) {
      head.flags |= VFIO_IOMMU_INFO_CAPS;
      if (argsz >= answer.size()) head.cap_offset = sizeof(head);
    }
    std::memcpy(answer.data(), &head, sizeof(head));
    std::memcpy(argument, answer.data(), argsz < answer.size() ? sizeof(head) : answer.size());
    return 0;
  }
  void AppendCaps(std::vector<uint8_t>* answer) const {
    const auto append = [answer](const void* data, size_t size) {
      const auto* bytes = static_cast<const uint8_t*>(data);
      answer->insert(answer->end(), bytes, bytes + size);
    };
    vfio_iommu_type1_info_dma_avail avail = {};
    avail.header = {VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, 1,
                    static_cast<uint32_t>(answer->size() + sizeof(avail) + 4)};
    avail.avail = state_->entry_limit - static_cast<uint32_t>(state_->mappings.size());
    append(&avail, sizeof(avail));
    append("\0\0\0\0", 4);
    vfio_iommu_type1_info_cap_iova_range ranges = {};
    ranges.header = {VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, 1, 0};
    ranges.nr_iovas = static_cast<uint32_t>(state_->ranges.size());
    append(&ranges, sizeof(ranges));
    append(state_->ranges.data(), state_->ranges.size() * sizeof(vfio_iova_range));
  }

  int Map(const vfio_iommu_type1_dma_map& request) {
    for (const auto& [iova, mapping] : state_->mappings) {
      if (iova < request.iova + request.size && request.iova < iova + mapping.size) return -EEXIST;
    }
    if (state_->mappings.size() >= state_->entry_limit) return -ENOSPC;
    state_->mappings[request.iova] = {request.size, request.vaddr, request.flags};
    return 0;
  }
  int Unmap(vfio_iommu_type1_dma_unmap& request) {
    uint64_t unmapped = 0;
    for (const auto& [iova, mapping] : state_->mappings) {
      const uint64_t end = request.iova + request.size;
      if (iova >= end || iova + mapping.size <= request.iova) continue;
      if (iova < request.iova || iova + mapping.size > end) return -EINVAL;
      unmapped += mapping.size;
    }
    std::erase_if(state_->mappings, [&](const auto& item) {
      return item.first >= request.iova && item.first < request.iova + request.size;
    });
    request.size = unmapped;
    return 0;
  }

  std::shared_ptr<State> state_;
};

}  // namespace mvgpu::testing
