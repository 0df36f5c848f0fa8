#include "tests/fakes/virtio_pci_driver.h"

namespace mvgpu::testing {

std::vector<VirtioPciDriver::Capability> VirtioPciDriver::capabilities() {
  std::vector<Capability> found;
  if ((read_config<uint16_t>(0x06) & 0x10) == 0) return found;
  uint32_t at = read_config<uint8_t>(0x34) & 0xfcu;
  while (at != 0) {
    if (at < 0x40 || found.size() > 48) return {};
    Capability c{.id = read_config<uint8_t>(at), .offset = at};
    if (c.id == 0x09) {
      c.cfg_type = read_config<uint8_t>(at + 3);
      c.bar = read_config<uint8_t>(at + 4);
      c.bar_offset = read_config<uint32_t>(at + 8);
      c.length = read_config<uint32_t>(at + 12);
    }
    found.push_back(c);
    at = read_config<uint8_t>(at + 1) & 0xfcu;
  }
  return found;
}

bool VirtioPciDriver::probe() {
  structures_.clear();
  for (const Capability& c : capabilities()) {
    if (c.id != 0x09) continue;
    structures_.emplace(c.cfg_type, c);
    if (c.cfg_type == kNotify) notify_multiplier_ = read_config<uint32_t>(c.offset + 16);
  }
  for (const uint8_t type : {kCommon, kNotify, kIsr, kDevice, kPciCfg}) {
    if (structures_.count(type) == 0) return false;
  }
  return true;
}

uint64_t VirtioPciDriver::device_features() {
  put<uint32_t>(kCommon, 0, 0);
  const uint64_t low = get<uint32_t>(kCommon, 4);
  put<uint32_t>(kCommon, 0, 1);
  return low | uint64_t{get<uint32_t>(kCommon, 4)} << 32;
}

void VirtioPciDriver::set_driver_features(uint64_t features) {
  put<uint32_t>(kCommon, 8, 0);
  put<uint32_t>(kCommon, 12, static_cast<uint32_t>(features));
  put<uint32_t>(kCommon, 8, 1);
  put<uint32_t>(kCommon, 12, static_cast<uint32_t>(features >> 32));
}

uint16_t VirtioPciDriver::set_config_vector(uint16_t vector) {
  put<uint16_t>(kCommon, 16, vector);
  return get<uint16_t>(kCommon, 16);
}

bool VirtioPciDriver::negotiate(uint64_t features) {
  set_status(0);
  if (status() != 0) return false;
  set_status(1);
  set_status(1 | 2);
  set_driver_features(features);
  set_status(1 | 2 | 8);
  return (status() & 8) != 0;
}

uint16_t VirtioPciDriver::queue_size(uint16_t queue) {
  put<uint16_t>(kCommon, 22, queue);
  return get<uint16_t>(kCommon, 24);
}

uint16_t VirtioPciDriver::set_up_queue(uint16_t queue, const VirtqueueDriver& rings,
                                       uint16_t vector) {
  put<uint16_t>(kCommon, 22, queue);
  put<uint16_t>(kCommon, 24, rings.size());
  const uint64_t addresses[] = {rings.descriptors(), rings.available(), rings.used()};
  for (uint32_t i = 0; i < 3; ++i) {
    put<uint32_t>(kCommon, 32 + 8 * i, static_cast<uint32_t>(addresses[i]));
    put<uint32_t>(kCommon, 36 + 8 * i, static_cast<uint32_t>(addresses[i] >> 32));
  }
  put<uint16_t>(kCommon, 26, vector);
  const uint16_t taken = get<uint16_t>(kCommon, 26);
  put<uint16_t>(kCommon, 28, 1);
  return taken;
}

void VirtioPciDriver::notify(uint16_t queue) {
  put<uint16_t>(kCommon, 22, queue);
  const uint32_t offset = get<uint16_t>(kCommon, 30) * notify_multiplier_;
  put<uint16_t>(kNotify, offset, queue);
}

}  // namespace mvgpu::testing
