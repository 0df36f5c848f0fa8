#include "tests/backend/gpu_guest.h"

#include <cstring>

namespace mvgpu::testing {

Result<void> GpuGuest::Map(uint64_t iova, uint64_t size, bool with_file) {
  if (with_file) return device_.dma_map(ram_.map_request(iova, iova - kRam, size));
  return device_.dma_map({Iova(iova), size, domain::Access::kReadWrite, UniqueFd(), 0});
}

Result<void> GpuGuest::map_low() { return Map(kRam, kLowSize, low_has_file_); }

Result<void> GpuGuest::map_pictures() { return Map(kPictures, kPicturesSize, pictures_have_file_); }

Result<uint64_t> GpuGuest::unmap_pictures() {
  return device_.dma_unmap(Iova(kPictures), kPicturesSize);
}

bool GpuGuest::boot() {
  if (!driver_.probe()) return false;
  if (!driver_.negotiate(VirtioPciDriver::kVersion1 | VirtioPciDriver::kAccessPlatform | 2)) {
    return false;
  }
  control_.restart();
  cursor_.restart();
  driver_.set_config_vector(0);
  driver_.set_up_queue(0, control_, 1);
  driver_.set_up_queue(1, cursor_, 2);
  driver_.driver_ok();
  return driver_.status() == 0x0f;
}

std::optional<std::vector<std::byte>> GpuGuest::execute(const wire::RequestBytes& request,
                                                        uint32_t response_space) {
  const uint64_t mark = memory_.mark();
  DescriptorChainBuilder chain(&memory_);
  chain.readable(request.bytes()).writable(response_space);
  control_.add(chain);
  driver_.notify(0);
  auto used = control_.take_used();
  while (!used) {
    if (!wait_()) return std::nullopt;
    used = control_.take_used();
  }
  auto answer = memory_.get_bytes(chain.address(1), used->len);
  memory_.release_to(mark);
  return answer;
}

uint32_t GpuGuest::run(const wire::RequestBytes& request) {
  const auto answer = execute(request);
  uint32_t type = 0;
  if (answer && answer->size() == 24) std::memcpy(&type, answer->data(), sizeof(type));
  return type;
}

uint32_t GpuGuest::create(uint32_t id) {
  return run(
      wire::RequestBytes(wire::kCmdCreate2d).u32({id, wire::kFormatB8G8R8X8, kWidth, kHeight}));
}

uint32_t GpuGuest::attach(uint32_t id, const std::vector<wire::WireEntry>& entries) {
  wire::RequestBytes request(wire::kCmdAttach);
  request.u32({id, static_cast<uint32_t>(entries.size())});
  for (const wire::WireEntry& entry : entries) request.add(entry);
  return run(request);
}

uint32_t GpuGuest::transfer(uint32_t id) {
  return run(wire::RequestBytes(wire::kCmdTransfer).add(kWhole).add(uint64_t{0}).u32({id, 0}));
}

uint32_t GpuGuest::set_scanout(uint32_t id) {
  return run(wire::RequestBytes(wire::kCmdSetScanout).add(kWhole).u32({0, id}));
}

uint32_t GpuGuest::flush(uint32_t id) {
  return run(wire::RequestBytes(wire::kCmdFlush).add(kWhole).u32({id, 0}));
}

uint32_t GpuGuest::detach(uint32_t id) {
  return run(wire::RequestBytes(wire::kCmdDetach).u32({id, 0}));
}

uint32_t GpuGuest::unref(uint32_t id) {
  return run(wire::RequestBytes(wire::kCmdUnref).u32({id, 0}));
}

bool GpuGuest::move_cursor(uint32_t x, uint32_t y) {
  const uint64_t mark = memory_.mark();
  DescriptorChainBuilder chain(&memory_);
  chain.readable(wire::RequestBytes(wire::kCmdMoveCursor).u32({0, x, y, 0, 0, 0, 0, 0}).bytes());
  cursor_.add(chain);
  driver_.notify(1);
  while (!cursor_.take_used()) {
    if (!wait_()) return false;
  }
  memory_.release_to(mark);
  return true;
}

void GpuGuest::paint(uint32_t seed) {
  for (uint32_t i = 0; i < kWidth * kHeight; ++i) {
    ram_.put<uint32_t>(kLowSize + 4 * i, seed * 0x01234567u + i * 2654435761u);
  }
}

bool GpuGuest::draw(uint32_t id, uint32_t frames) {
  bool ok =
      create(id) == wire::kOk && attach_picture(id) == wire::kOk && set_scanout(id) == wire::kOk;
  for (uint32_t i = 0; ok && i < frames; ++i) {
    paint(i + 1);
    ok = transfer(id) == wire::kOk && flush(id) == wire::kOk;
  }
  return ok;
}

}  // namespace mvgpu::testing
