#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/container.h"
#include "apionly-domain/pin/pin_backend.h"
#include "dma-cache/dma_cache.h"
#include "gpu-model/gpu_device.h"
#include "tests/fakes/counting_mapper.h"
#include "tests/fakes/fake_remote_memory.h"
#include "tests/fakes/guest_ram.h"
#include "tests/fakes/result_matchers.h"
#include "tests/gpu-model/wire.h"

namespace mvgpu::gpu::testing {

// Remembers what it was shown.
class FakeDisplay final : public Display {
 public:
  struct Frame {
    uint32_t scanout;
    Size size;
    Rect damage;
    std::vector<std::byte> pixels;  // without padding
  };
  void on_frame(uint32_t scanout, const FrameView& view, const Rect& damage) override {
    ASSERT_EQ(view.pixels.size(), size_t{view.stride} * view.size.height);
    Frame frame{scanout, view.size, damage, {}};
    for (uint32_t y = 0; y < view.size.height; ++y) {
      const auto line = view.pixels.subspan(size_t{y} * view.stride, size_t{view.size.width} * 4);
      frame.pixels.insert(frame.pixels.end(), line.begin(), line.end());
    }
    frames.push_back(std::move(frame));
  }
  void on_disabled(uint32_t scanout) override { disabled.push_back(scanout); }

  std::vector<Frame> frames;
  std::vector<uint32_t> disabled;
};

class FakeOwner final : public GpuDevice::Owner {
 public:
  void on_display_event() override { ++events; }
  int events = 0;
};

// A device over 16 MiB of guest RAM at kRam; nothing is mapped before and behind it. Ends with a
// reset, after which nothing may be held anywhere.
class GpuTest : public ::testing::Test {
 protected:
  static constexpr uint64_t kRam = 0x100000;
  static constexpr uint64_t kRamSize = 16u << 20;
  static constexpr uint64_t kRemote = uint64_t{1} << 40;  // without a file, where a test maps it
  static constexpr uint64_t kRemoteSize = 64u << 10;

  explicit GpuTest(GpuConfig config = {}, uint64_t pin_limit_pages = UINT64_MAX)
      : config_(config), pin_limit_pages_(pin_limit_pages) {}

  void SetUp() override {
    domain::ApiOnlyDomain::Options options;
    options.pin_limit_pages = pin_limit_pages_;
    options.remote = &remote_;
    auto domain =
        domain::ApiOnlyDomain::Create(options, domain::MakeNonePinBackend(), nullptr, nullptr);
    ASSERT_THAT(domain, mvgpu::testing::IsOk());
    domain_ = std::move(*domain);
    ASSERT_THAT(container_.attach(domain_.get()), mvgpu::testing::IsOk());
    MapRam(0, kRamSize);
    cache_.emplace(domain_.get(), &mapper_);
    auto device = GpuDevice::Create(config_, &*cache_, domain_.get(), &display_, &owner_);
    ASSERT_THAT(device, mvgpu::testing::IsOk());
    device_ = std::move(*device);
    ram_.fill_pattern();
  }

  void TearDown() override {
    device_->reset();
    ExpectNothingHeld();
    device_.reset();
    cache_.reset();
    ASSERT_THAT(container_.detach(domain_.get()), mvgpu::testing::IsOk());
  }

  void ExpectNothingHeld() {
    EXPECT_EQ(device_->counters().resources, 0u);
    EXPECT_EQ(device_->counters().attached_entries, 0u);
    EXPECT_EQ(device_->counters().host_bytes, 0u);
    EXPECT_EQ(cache_->counters().cached_pages, 0u);
    EXPECT_EQ(mapper_.mapped_pages(), 0u);
    EXPECT_EQ(domain_->counters().pinned_pages, 0u);
    EXPECT_EQ(domain_->counters().unique_pages, 0u);
  }

  // The VMM's side. Offsets are in RAM.
  void MapRam(uint64_t offset, uint64_t size) { MapRamAt(kRam + offset, offset, size); }
  void MapRamAt(uint64_t iova, uint64_t offset, uint64_t size) {
    ASSERT_THAT(container_.map(ram_.map_request(iova, offset, size)), mvgpu::testing::IsOk());
  }
  void UnmapAll() { ASSERT_THAT(container_.unmap_all(), mvgpu::testing::IsOk()); }

  // The guest's side: each returns the type of the response.
  uint32_t Execute(const RequestBytes& request) {
    std::vector<std::byte> response(24, std::byte{0xee});
    EXPECT_EQ(device_->execute_control(request.bytes(), response), 24u);
    WireHeader header;
    std::memcpy(&header, response.data(), sizeof(header));
    return header.type;
  }
  uint32_t Create(uint32_t id, uint32_t width, uint32_t height, uint32_t format = kFormatB8G8R8X8) {
    return Execute(RequestBytes(kCmdCreate2d).u32({id, format, width, height}));
  }
  uint32_t Unref(uint32_t id) { return Execute(RequestBytes(kCmdUnref).u32({id, 0})); }
  static RequestBytes AttachRequest(uint32_t id, const std::vector<WireEntry>& entries) {
    RequestBytes request(kCmdAttach);
    request.u32({id, static_cast<uint32_t>(entries.size())});
    for (const WireEntry& entry : entries) request.add(entry);
    return request;
  }
  uint32_t Attach(uint32_t id, const std::vector<WireEntry>& entries) {
    return Execute(AttachRequest(id, entries));
  }
  // One entry: `size` bytes of RAM from `offset` on.
  uint32_t AttachRam(uint32_t id, uint64_t offset, uint32_t size) {
    return Attach(id, {{kRam + offset, size}});
  }
  uint32_t Detach(uint32_t id) { return Execute(RequestBytes(kCmdDetach).u32({id, 0})); }
  uint32_t SetScanout(uint32_t scanout, uint32_t id, WireRect rect) {
    return Execute(RequestBytes(kCmdSetScanout).add(rect).u32({scanout, id}));
  }
  uint32_t Flush(uint32_t id, WireRect rect) {
    return Execute(RequestBytes(kCmdFlush).add(rect).u32({id, 0}));
  }
  uint32_t Transfer(uint32_t id, WireRect rect, uint64_t offset = 0) {
    return Execute(RequestBytes(kCmdTransfer).add(rect).add(offset).u32({id, 0}));
  }
  void Cursor(uint32_t type, uint32_t scanout, uint32_t x, uint32_t y, uint32_t id = 0,
              uint32_t hot_x = 0, uint32_t hot_y = 0) {
    device_->execute_cursor(
        RequestBytes(type).u32({scanout, x, y, 0, id, hot_x, hot_y, 0}).bytes());
  }
  // A resource with whole lines in RAM from `offset` on.
  void MakeBacked(uint32_t id, uint32_t width, uint32_t height, uint64_t offset = 0,
                  uint32_t format = kFormatB8G8R8X8) {
    ASSERT_EQ(Create(id, width, height, format), kOk);
    ASSERT_EQ(AttachRam(id, offset, width * height * 4), kOk);
  }

  uint64_t PinnedPages() const { return domain_->counters().pinned_pages; }
  const std::vector<std::byte>& LastPixels() const { return display_.frames.back().pixels; }
  std::vector<std::byte> RamBytes(uint64_t offset, uint64_t size) {
    return {ram_.at(offset), ram_.at(offset) + size};
  }

  GpuConfig config_;
  uint64_t pin_limit_pages_;
  mvgpu::testing::GuestRam ram_{kRamSize};
  mvgpu::testing::FakeRemoteMemory remote_{Iova(kRemote), kRemoteSize};
  domain::Container container_;
  std::unique_ptr<domain::ApiOnlyDomain> domain_;
  mvgpu::testing::CountingMapper mapper_;
  std::optional<dma::DmaCache> cache_;
  FakeDisplay display_;
  FakeOwner owner_;
  std::unique_ptr<GpuDevice> device_;
};

}  // namespace mvgpu::gpu::testing
