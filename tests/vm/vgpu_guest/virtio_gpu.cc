#include "tests/vm/vgpu_guest/virtio_gpu.h"

namespace mvgpu::bare {

namespace {

// virtio 1.2, 4.1.4
constexpr uint8_t kVendorCapability = 9;
constexpr uint8_t kCommonConfig = 1;
constexpr uint8_t kNotifyConfig = 2;
// 2.1
constexpr uint8_t kAcknowledge = 1;
constexpr uint8_t kDriver = 2;
constexpr uint8_t kDriverOk = 4;
constexpr uint8_t kFeaturesOk = 8;
constexpr uint16_t kQueueSize = 4;
constexpr uint16_t kNext = 1;
constexpr uint16_t kWrite = 2;

// 4.1.4.3
struct CommonConfig {
  uint32_t device_feature_select;
  uint32_t device_feature;
  uint32_t driver_feature_select;
  uint32_t driver_feature;
  uint16_t config_msix_vector;
  uint16_t num_queues;
  uint8_t device_status;
  uint8_t config_generation;
  uint16_t queue_select;
  uint16_t queue_size;
  uint16_t queue_msix_vector;
  uint16_t queue_enable;
  uint16_t queue_notify_off;
  uint32_t queue_desc[2];
  uint32_t queue_driver[2];
  uint32_t queue_device[2];
};
static_assert(sizeof(CommonConfig) == 56);

// 2.7
struct Descriptor {
  uint64_t address;
  uint32_t length;
  uint16_t flags;
  uint16_t next;
};
struct Available {
  uint16_t flags;
  uint16_t index;
  uint16_t ring[kQueueSize];
};
struct Used {
  uint16_t flags;
  uint16_t index;
  struct {
    uint32_t id;
    uint32_t length;
  } ring[kQueueSize];
};

// 5.7.6.7 and 5.7.6.8
constexpr uint32_t kOkNoData = 0x1100;
struct Header {
  uint32_t type;
  uint32_t flags = 0;
  uint64_t fence_id = 0;
  uint32_t context_id = 0;
  uint32_t padding = 0;
};
struct Rectangle {
  uint32_t x = 0;
  uint32_t y = 0;
  uint32_t width = 640;
  uint32_t height = 480;
};
constexpr uint32_t kResource = 1;
struct Create2d {
  Header header{0x101};
  uint32_t resource = kResource;
  uint32_t format = 1;  // B8G8R8A8
  uint32_t width = 640;
  uint32_t height = 480;
};
struct SetScanout {
  Header header{0x103};
  Rectangle rectangle;
  uint32_t scanout = 0;
  uint32_t resource = kResource;
};
struct Flush {
  Header header{0x104};
  Rectangle rectangle;
  uint32_t resource = kResource;
  uint32_t padding = 0;
};
struct Transfer {
  Header header{0x105};
  Rectangle rectangle;
  uint64_t offset = 0;
  uint32_t resource = kResource;
  uint32_t padding = 0;
};
struct Attach {
  Header header{0x106};
  uint32_t resource = kResource;
  uint32_t entries = 1;
  uint64_t address = VirtioGpu::kPicture;
  uint32_t length = VirtioGpu::kPicturePages * 4096;
  uint32_t padding = 0;
};
struct Detach {
  Header header{0x107};
  uint32_t resource = kResource;
  uint32_t padding = 0;
};

// What the device reads and writes beside the picture. Without paging an object's address is its
// guest-physical one.
alignas(4096) Descriptor descriptors[kQueueSize];
alignas(4096) Available available;
alignas(4096) Used used;
alignas(4096) uint8_t request_bytes[256];
alignas(4096) Header response{0};

uint32_t AddressOf(const volatile void* object) { return reinterpret_cast<uint32_t>(object); }

// Order on x86 is the program's; only the compiler has to be told.
void Barrier() { asm volatile("mfence" : : : "memory"); }

}  // namespace

VirtioGpu::Place VirtioGpu::Find(const PciSlot& slot, uint8_t type) {
  for (uint32_t at = slot.read8(0x34) & 0xfcu; at != 0; at = slot.read8(at + 1) & 0xfcu) {
    if (slot.read8(at) != kVendorCapability || slot.read8(at + 3) != type) continue;
    const uint32_t bar = 0x10 + slot.read8(at + 4) * 4u;
    const uint32_t low = slot.read32(bar);
    const bool is_64_bit = (low & 7) == 4;
    if ((low & 1) != 0 || (is_64_bit && slot.read32(bar + 4) != 0)) return {};
    const uint32_t base = (low & ~15u) + slot.read32(at + 8);
    return {reinterpret_cast<volatile uint8_t*>(base),
            type == kNotifyConfig ? slot.read32(at + 16) : 0};
  }
  return {};
}

bool VirtioGpu::start(const PciSlot& slot) {
  common_ = Find(slot, kCommonConfig);
  notify_ = Find(slot, kNotifyConfig);
  if (common_.base == nullptr || notify_.base == nullptr) return false;
  slot.write32(4, (slot.read32(4) & 0xffffu) | 6);  // memory space, bus mastering
  auto* const config = reinterpret_cast<volatile CommonConfig*>(common_.base);
  config->device_status = 0;
  while (config->device_status != 0) {
  }
  config->device_status = kAcknowledge | kDriver;
  config->device_feature_select = 1;
  if ((config->device_feature & 1) == 0) return false;  // VIRTIO_F_VERSION_1
  config->driver_feature_select = 0;
  config->driver_feature = 0;
  config->driver_feature_select = 1;
  config->driver_feature = 1;
  config->device_status = kAcknowledge | kDriver | kFeaturesOk;
  return (config->device_status & kFeaturesOk) != 0 && SetUpQueue();
}

bool VirtioGpu::SetUpQueue() {
  auto* const config = reinterpret_cast<volatile CommonConfig*>(common_.base);
  config->queue_select = 0;
  if (config->queue_size < kQueueSize) return false;
  config->queue_size = kQueueSize;
  config->queue_desc[0] = AddressOf(descriptors);
  config->queue_desc[1] = 0;
  config->queue_driver[0] = AddressOf(&available);
  config->queue_driver[1] = 0;
  config->queue_device[0] = AddressOf(&used);
  config->queue_device[1] = 0;
  doorbell_ = reinterpret_cast<volatile uint16_t*>(
      notify_.base + static_cast<uint32_t>(config->queue_notify_off) * notify_.multiplier);
  config->queue_enable = 1;
  config->device_status = kAcknowledge | kDriver | kFeaturesOk | kDriverOk;
  return true;
}

template <typename Request>
bool VirtioGpu::Ask(const Request& request) {
  static_assert(sizeof(Request) <= sizeof(request_bytes));
  const auto* const from = reinterpret_cast<const volatile uint8_t*>(&request);
  for (uint32_t i = 0; i < sizeof(Request); ++i) request_bytes[i] = from[i];
  return Send(sizeof(Request));
}

bool VirtioGpu::Send(uint32_t size) {
  response.type = 0;
  descriptors[0] = {AddressOf(request_bytes), size, kNext, 1};
  descriptors[1] = {AddressOf(&response), sizeof response, kWrite, 0};
  available.ring[sent_ % kQueueSize] = 0;
  Barrier();
  available.index = ++sent_;
  Barrier();
  *doorbell_ = 0;
  while (const_cast<volatile Used&>(used).index != sent_) {
  }
  Barrier();
  return response.type == kOkNoData;
}

bool VirtioGpu::create_picture() { return Ask(Create2d()); }

bool VirtioGpu::attach() { return Ask(Attach()); }

bool VirtioGpu::show() { return Ask(SetScanout()) && Ask(Transfer()) && Ask(Flush()); }

bool VirtioGpu::detach() { return Ask(Detach()); }

}  // namespace mvgpu::bare
