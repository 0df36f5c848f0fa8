#include <gtest/gtest.h>

#include <array>
#include <cstdlib>
#include <random>

#include "tests/gpu-model/gpu_fixture.h"

namespace mvgpu::gpu {
namespace {

using namespace testing;  // NOLINT: the fixture of this folder

// Random requests, some of them nearly right. 100000 of them, or MVGPU_HOSTILE_REQUESTS for the
// long form.
class HostileRequestsTest : public GpuTest {
 protected:
  HostileRequestsTest()
      : GpuTest({.scanouts = 2, .host_memory_limit = 4u << 20, .max_resources = 16}) {}

  static uint64_t Iterations() {
    const char* wish = std::getenv("MVGPU_HOSTILE_REQUESTS");
    return wish != nullptr ? std::strtoull(wish, nullptr, 10) : 100000;
  }

  uint32_t Pick(uint32_t bound) { return static_cast<uint32_t>(random_() % bound); }
  // Small numbers, numbers around limits, and anything.
  uint32_t Number() {
    static constexpr std::array<uint32_t, 12> kEdges = {
        0, 1, 15, 16, 64, 256, 16384, 16385, 0x7fffffff, 0x80000000, 0xfffffff0, 0xffffffff};
    switch (Pick(8)) {
      case 0:
        return kEdges[Pick(kEdges.size())];
      case 1:
        return static_cast<uint32_t>(random_());
      default:
        return Pick(130);
    }
  }
  WireRect Rectangle() { return {Number(), Number(), Number(), Number()}; }
  uint32_t Id() { return Pick(6); }
  uint64_t Address() {
    if (Pick(10) == 0) return (uint64_t{Number()} << 32) | Number();
    return kRam + Pick(kRamSize);
  }

  RequestBytes Request() {
    static constexpr std::array<uint32_t, 8> kFormats = {1, 2, 3, 4, 67, 68, 121, 134};
    switch (Pick(9)) {
      case 0:
        return RequestBytes(kCmdCreate2d)
            .u32({Id(), Pick(8) == 0 ? Number() : kFormats[Pick(8)], Number(), Number()});
      case 1:
        return RequestBytes(Pick(2) == 0 ? kCmdUnref : kCmdDetach).u32({Id(), 0});
      case 2: {
        std::vector<WireEntry> entries(Pick(6));
        for (WireEntry& entry : entries) entry = {Address(), Pick(4) == 0 ? Number() : Pick(20000)};
        RequestBytes request = AttachRequest(Id(), entries);
        return request;
      }
      case 3:
        return RequestBytes(kCmdSetScanout).add(Rectangle()).u32({Pick(3), Id()});
      case 4:
        return RequestBytes(kCmdFlush).add(Rectangle()).u32({Id(), 0});
      case 5:
      case 6:
        return RequestBytes(kCmdTransfer)
            .add(Rectangle())
            .add(Pick(3) == 0 ? (uint64_t{Number()} << 32) | Number() : uint64_t{Pick(20000)})
            .u32({Id(), 0});
      case 7:
        return RequestBytes(kCmdGetEdid).u32({Number(), 0});
      default: {
        RequestBytes request(0x100 + Pick(0x10));
        for (uint32_t i = Pick(20); i > 0; --i) request.u32({Number()});
        return request;
      }
    }
  }

  // What any state must satisfy.
  void CheckInvariants() {
    const GpuDevice::Counters counters = device_->counters();
    ASSERT_LE(counters.host_bytes, config_.host_memory_limit);
    ASSERT_LE(counters.resources, config_.max_resources);
    ASSERT_EQ(mapper_.mapped_pages(), cache_->counters().cached_pages);
    for (uint32_t i = 0; i < 2; ++i) {
      if (const auto frame = device_->frame(i)) {
        ASSERT_EQ(frame->pixels.size(), size_t{frame->stride} * frame->size.height);
      }
    }
  }

  std::mt19937 random_;
};

TEST_F(HostileRequestsTest, NothingCrashesAndNothingStays) {
  constexpr uint32_t kSeed = 20240611;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  random_.seed(kSeed);
  bool mapped = true;
  uint64_t succeeded = 0;
  for (uint64_t i = 0; i < Iterations(); ++i) {
    RequestBytes request = Request();
    if (Pick(20) == 0) request.cut(Pick(static_cast<uint32_t>(request.bytes().size()) + 1));
    std::array<std::byte, 2048> response;
    const size_t room = Pick(10) == 0 ? Pick(100) : response.size();
    const uint32_t written =
        *device_->execute_control(request.bytes(), std::span(response).first(room));
    ASSERT_LE(written, room);
    if (written >= 24) {
      uint32_t type;
      std::memcpy(&type, response.data(), sizeof(type));
      ASSERT_TRUE((type >= kOk && type <= kOkEdid) || (type >= kErrUnspec && type <= kErrParameter))
          << type;
      succeeded += type < kErrUnspec ? 1 : 0;
    }
    if (Pick(20) == 0) {
      Cursor(Pick(2) == 0 ? kCmdUpdateCursor : kCmdMoveCursor, Pick(3), Number(), Number(), Id());
    }
    if (Pick(500) == 0) {  // the VMM takes all memory away, or brings it back
      if (mapped) {
        UnmapAll();
      } else {
        MapRam(0, kRamSize);
      }
      mapped = !mapped;
    }
    if (Pick(5000) == 0) {
      device_->reset();
      ASSERT_NO_FATAL_FAILURE(ExpectNothingHeld());
    }
    if (i % 64 == 0) {
      ASSERT_NO_FATAL_FAILURE(CheckInvariants());
    }
  }
  // The requests are good enough to reach what lies behind the checks.
  EXPECT_GT(succeeded, Iterations() / 20);
  EXPECT_GT(device_->counters().frames, 0u);
  EXPECT_GT(device_->counters().transferred_bytes, 0u);
  device_->reset();
  ExpectNothingHeld();
}

TEST_F(HostileRequestsTest, RandomBytesBehindEveryCommandNumber) {
  constexpr uint32_t kSeed = 7;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  random_.seed(kSeed);
  std::array<std::byte, 2048> response;
  for (uint64_t i = 0; i < Iterations(); ++i) {
    RequestBytes request(Pick(2) == 0 ? 0x100 + Pick(0x20) : 0x200 + Pick(0x200));
    for (uint32_t k = Pick(40); k > 0; --k) request.u32({static_cast<uint32_t>(random_())});
    ASSERT_GE(*device_->execute_control(request.bytes(), response), 24u);
    device_->execute_cursor(request.bytes());
  }
  EXPECT_EQ(device_->counters().control_commands, Iterations());
}

}  // namespace
}  // namespace mvgpu::gpu
