#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <limits>

#include "tests/gpu-model/gpu_fixture.h"

namespace mvgpu::gpu {
namespace {

using namespace testing;  // NOLINT: the fixture of this folder

class ResourceCommandsTest : public GpuTest {};

TEST_F(ResourceCommandsTest, CreatedResourceCanBeUsedAndRemoved) {
  EXPECT_EQ(Create(1, 64, 32), kOk);
  EXPECT_EQ(device_->counters().resources, 1u);
  EXPECT_EQ(device_->counters().host_bytes, 64u * 4 * (32 + 1));  // and a spare line
  EXPECT_EQ(Unref(1), kOk);
  ExpectNothingHeld();
  EXPECT_EQ(Unref(1), kErrResourceId);
}

TEST_F(ResourceCommandsTest, IdZeroAndTakenIdsAreRefused) {
  EXPECT_EQ(Create(0, 16, 16), kErrResourceId);
  EXPECT_EQ(Create(7, 16, 16), kOk);
  EXPECT_EQ(Create(7, 16, 16), kErrResourceId);
  EXPECT_EQ(Create(0xffffffff, 16, 16), kOk);
  EXPECT_EQ(device_->counters().resources, 2u);
}

TEST_F(ResourceCommandsTest, OnlyTheEightFormatsAreKnown) {
  uint32_t id = 1;
  for (const uint32_t format : {1u, 2u, 3u, 4u, 67u, 68u, 121u, 134u}) {
    EXPECT_EQ(Create(id++, 16, 16, format), kOk) << format;
  }
  for (const uint32_t format : {0u, 5u, 66u, 69u, 120u, 135u, 0xffffffffu}) {
    EXPECT_EQ(Create(id++, 16, 16, format), kErrParameter) << format;
  }
}

TEST_F(ResourceCommandsTest, ImpossibleSizesAreRefused) {
  EXPECT_EQ(Create(1, 0, 16), kErrParameter);
  EXPECT_EQ(Create(1, 16, 0), kErrParameter);
  EXPECT_EQ(Create(1, 16385, 1), kErrParameter);
  EXPECT_EQ(Create(1, 1, 16385), kErrParameter);
  // 32-bit arithmetic would see a picture of no bytes at all.
  static_assert(uint32_t{0x10000} * 0x10000u * 4u == 0);
  EXPECT_EQ(Create(1, 0x10000, 0x10000), kErrParameter);
  EXPECT_EQ(Create(1, 16384, 1), kOk);
  EXPECT_EQ(Create(2, 1, 16384), kOk);
}

TEST_F(ResourceCommandsTest, TruncatedRequestsAreRefused) {
  ASSERT_EQ(Create(1, 16, 16), kOk);
  const auto attempt = [this](RequestBytes request) { return Execute(request.cut(1)); };
  EXPECT_EQ(attempt(RequestBytes(kCmdCreate2d).u32({2, 2, 16, 16})), kErrParameter);
  EXPECT_EQ(attempt(RequestBytes(kCmdUnref).u32({1, 0})), kErrParameter);
  EXPECT_EQ(attempt(RequestBytes(kCmdDetach).u32({1, 0})), kErrParameter);
  EXPECT_EQ(attempt(RequestBytes(kCmdAttach).u32({1, 0})), kErrParameter);
  EXPECT_EQ(attempt(RequestBytes(kCmdFlush).add(WireRect{}).u32({1, 0})), kErrParameter);
  EXPECT_EQ(attempt(RequestBytes(kCmdSetScanout).add(WireRect{}).u32({0, 0})), kErrParameter);
  EXPECT_EQ(attempt(RequestBytes(kCmdTransfer).add(WireRect{}).add(uint64_t{0}).u32({1, 0})),
            kErrParameter);
  EXPECT_EQ(attempt(RequestBytes(kCmdGetEdid).u32({0, 0})), kErrParameter);
  EXPECT_EQ(attempt(RequestBytes(kCmdUnref).cut(8)), kErrUnspec);  // not even a header
  EXPECT_EQ(device_->counters().failed_commands, 9u);
  EXPECT_EQ(device_->counters().resources, 1u);
  EXPECT_EQ(Execute(RequestBytes(kCmdUnref).u32({1, 0})), kOk);  // the whole of it is fine
}

TEST_F(ResourceCommandsTest, OtherCommandsAreUnspecifiedErrors) {
  for (const uint32_t type : {0u, 0xffu, 0x108u, 0x109u, 0x10bu, 0x10cu, 0x10du, 0x200u, 0x300u,
                              0x301u, 0x1100u, 0xffffffffu}) {
    EXPECT_EQ(Execute(RequestBytes(type).u32({1, 2, 3, 4, 5, 6, 7, 8})), kErrUnspec) << type;
  }
}

TEST_F(ResourceCommandsTest, FencedRequestsAreAnsweredWithTheirFence) {
  std::array<std::byte, 24> bytes;
  const auto answer = [&](const WireHeader& header) {
    EXPECT_EQ(device_->execute_control(RequestBytes(header).u32({9, 2, 16, 16}).bytes(), bytes),
              24u);
    WireHeader reply;
    std::memcpy(&reply, bytes.data(), sizeof(reply));
    return reply;
  };
  const WireHeader fenced = answer({kCmdCreate2d, 1, 0x123456789abc, 77, 5, {}});
  EXPECT_EQ(fenced.type, kOk);
  EXPECT_EQ(fenced.flags, 1u);
  EXPECT_EQ(fenced.fence_id, 0x123456789abcu);
  EXPECT_EQ(fenced.ctx_id, 77u);
  EXPECT_EQ(fenced.ring_idx, 0u);

  const WireHeader failed = answer({kCmdCreate2d, 3, 42, 1, 5, {}});  // id 9 is taken
  EXPECT_EQ(failed.type, kErrResourceId);
  EXPECT_EQ(failed.flags, 3u);
  EXPECT_EQ(failed.fence_id, 42u);
  EXPECT_EQ(failed.ring_idx, 5u);

  const WireHeader plain = answer({kCmdCreate2d, 0, 43, 1, 5, {}});
  EXPECT_EQ(plain.flags, 0u);
  EXPECT_EQ(plain.fence_id, 0u);
  EXPECT_EQ(plain.ctx_id, 0u);
}

TEST_F(ResourceCommandsTest, ResponsesAreCutToTheGuestsBuffer) {
  std::array<std::byte, 30> bytes{};
  const RequestBytes request = RequestBytes(kCmdGetDisplayInfo);
  EXPECT_EQ(device_->execute_control(request.bytes(), std::span(bytes).first(0)), 0u);
  EXPECT_EQ(device_->execute_control(request.bytes(), std::span(bytes).first(5)), 5u);
  EXPECT_EQ(bytes[5], std::byte{0});
  EXPECT_EQ(device_->execute_control(request.bytes(), bytes), 30u);
}

TEST_F(ResourceCommandsTest, AttachListMustBeAsLongAsItSays) {
  ASSERT_EQ(Create(1, 16, 16), kOk);
  EXPECT_EQ(Execute(RequestBytes(kCmdAttach).u32({1, 2}).add(WireEntry{kRam, 4096})), kErrUnspec);
  EXPECT_EQ(Execute(AttachRequest(1, {{kRam, 4096}}).cut(1)), kErrUnspec);
  // 32-bit arithmetic would see a list of no bytes at all.
  static_assert(uint32_t{0x10000000} * sizeof(WireEntry) != 0 &&
                static_cast<uint32_t>(uint32_t{0x10000000} * sizeof(WireEntry)) == 0);
  EXPECT_EQ(Execute(RequestBytes(kCmdAttach).u32({1, 0x10000000})), kErrUnspec);
  EXPECT_EQ(PinnedPages(), 0u);
  EXPECT_EQ(AttachRam(1, 0, 4096), kOk);
}

TEST_F(ResourceCommandsTest, AttachChecksTheResource) {
  EXPECT_EQ(AttachRam(1, 0, 4096), kErrResourceId);
  ASSERT_EQ(Create(1, 16, 16), kOk);
  EXPECT_EQ(AttachRam(1, 0, 4096), kOk);
  EXPECT_EQ(AttachRam(1, 8192, 4096), kErrUnspec);  // it has a backing
  EXPECT_EQ(device_->counters().attached_entries, 1u);
}

TEST_F(ResourceCommandsTest, AttachOfNothingAttachesNothing) {
  ASSERT_EQ(Create(1, 16, 16), kOk);
  EXPECT_EQ(Attach(1, {}), kOk);
  EXPECT_EQ(Transfer(1, {0, 0, 16, 16}), kErrUnspec);
  EXPECT_EQ(AttachRam(1, 0, 1024), kOk);
  EXPECT_EQ(Transfer(1, {0, 0, 16, 16}), kOk);
}

TEST_F(ResourceCommandsTest, BadEntriesAreRefusedAndNothingStaysPinned) {
  ASSERT_EQ(Create(1, 16, 16), kOk);
  EXPECT_EQ(Attach(1, {{kRam, 4096}, {kRam + 8192, 0}}), kErrUnspec);          // empty
  EXPECT_EQ(Attach(1, {{kRam, 4096}, {0, 4096}}), kErrUnspec);                 // not mapped
  EXPECT_EQ(Attach(1, {{kRam, 4096}, {kRam + kRamSize - 1, 2}}), kErrUnspec);  // one byte too many
  static_assert(uint64_t{0xfffffffffffff000} + 0x2000 < 0xfffffffffffff000);   // wraps
  EXPECT_EQ(Attach(1, {{kRam, 4096}, {0xfffffffffffff000, 0x2000}}), kErrUnspec);
  EXPECT_EQ(PinnedPages(), 0u);
  EXPECT_EQ(mapper_.mapped_pages(), 0u);
  EXPECT_EQ(device_->counters().attached_entries, 0u);
  EXPECT_EQ(Attach(1, {{kRam, 4096}, {kRam + kRamSize - 1, 1}}), kOk);
}

TEST_F(ResourceCommandsTest, DetachNeedsABacking) {
  EXPECT_EQ(Detach(1), kErrResourceId);
  ASSERT_EQ(Create(1, 16, 16), kOk);
  EXPECT_EQ(Detach(1), kErrUnspec);
  ASSERT_EQ(AttachRam(1, 0, 1024), kOk);
  EXPECT_EQ(Detach(1), kOk);
  EXPECT_EQ(Detach(1), kErrUnspec);
}

TEST_F(ResourceCommandsTest, TransferChecksResourceAndBacking) {
  EXPECT_EQ(Transfer(1, {0, 0, 16, 16}), kErrResourceId);
  ASSERT_EQ(Create(1, 16, 16), kOk);
  EXPECT_EQ(Transfer(1, {0, 0, 16, 16}), kErrUnspec);
  ASSERT_EQ(AttachRam(1, 0, 1024), kOk);
  EXPECT_EQ(Transfer(1, {0, 0, 16, 16}), kOk);
  EXPECT_EQ(device_->counters().transferred_bytes, 1024u);
}

TEST_F(ResourceCommandsTest, RectanglesOutsideThePictureAreRefusedAlsoWhenTheyWrap) {
  MakeBacked(1, 64, 64);
  constexpr uint32_t kMax = std::numeric_limits<uint32_t>::max();
  constexpr WireRect kWrapsX{kMax - 7, 0, 16, 16};
  static_assert(static_cast<uint32_t>(kWrapsX.x + kWrapsX.width) <= 64);
  constexpr WireRect kWrapsY{0, kMax - 7, 16, 16};
  static_assert(static_cast<uint32_t>(kWrapsY.y + kWrapsY.height) <= 64);
  constexpr WireRect kWrapsWidth{16, 0, kMax, 16};
  static_assert(static_cast<uint32_t>(kWrapsWidth.x + kWrapsWidth.width) <= 64);
  for (const WireRect& rect :
       {kWrapsX, kWrapsY, kWrapsWidth, WireRect{0, 0, 65, 64}, WireRect{0, 0, 64, 65},
        WireRect{1, 0, 64, 64}, WireRect{0, 1, 64, 64}, WireRect{65, 0, 0, 0}}) {
    EXPECT_EQ(Transfer(1, rect), kErrParameter) << rect.x << " " << rect.width;
    EXPECT_EQ(Flush(1, rect), kErrParameter) << rect.x << " " << rect.width;
    EXPECT_EQ(SetScanout(0, 1, rect), kErrParameter) << rect.x << " " << rect.width;
  }
  EXPECT_EQ(Transfer(1, {0, 0, 64, 64}), kOk);
  EXPECT_EQ(Transfer(1, {63, 63, 1, 1}), kOk);
  EXPECT_EQ(Transfer(1, {64, 64, 0, 0}), kOk);  // nothing, at the very end
  EXPECT_EQ(Flush(1, {64, 64, 0, 0}), kOk);
}

TEST_F(ResourceCommandsTest, OffsetsBehindTheBackingAreRefusedAlsoWhenTheyWrap) {
  MakeBacked(1, 64, 64);
  constexpr uint64_t kWraps = std::numeric_limits<uint64_t>::max() - 255;
  static_assert(kWraps + 64 * 4 == 0);
  EXPECT_EQ(Transfer(1, {0, 0, 64, 64}, kWraps), kErrParameter);
  EXPECT_EQ(Transfer(1, {0, 0, 8, 8}, kWraps), kErrParameter);
  static_assert(static_cast<uint32_t>(uint64_t{1} << 32) == 0);  // what 32 bits would make of it
  EXPECT_EQ(Transfer(1, {0, 0, 8, 8}, uint64_t{1} << 32), kErrParameter);
  EXPECT_EQ(Transfer(1, {0, 0, 8, 8}, 64 * 64 * 4 + 1), kErrParameter);
  EXPECT_EQ(Transfer(1, {0, 0, 8, 8}, 64 * 64 * 4), kOk);  // nothing is left to copy
  EXPECT_EQ(device_->counters().transferred_bytes, 0u);
}

class SmallBudgetTest : public GpuTest {
 protected:
  SmallBudgetTest()
      : GpuTest({.host_memory_limit = 1u << 20, .max_resources = 3, .max_backing_entries = 4}) {}
};

TEST_F(SmallBudgetTest, HostMemoryIsLimited) {
  EXPECT_EQ(Create(1, 512, 511), kOk);  // exactly 1 MiB with its spare line
  EXPECT_EQ(Create(2, 1, 1), kErrOutOfMemory);
  EXPECT_EQ(Unref(1), kOk);
  EXPECT_EQ(Create(1, 512, 512), kErrOutOfMemory);
  EXPECT_EQ(Create(2, 1, 1), kOk);
}

TEST_F(SmallBudgetTest, ConversionBuffersCountToo) {
  ASSERT_NO_FATAL_FAILURE(MakeBacked(1, 256, 255, 0, kFormatR8G8B8X8));
  ASSERT_EQ(Create(2, 256, 700), kOk);
  EXPECT_EQ(SetScanout(0, 1, {0, 0, 256, 255}), kErrOutOfMemory);
  EXPECT_FALSE(device_->frame(0).has_value());
  ASSERT_EQ(Unref(2), kOk);
  EXPECT_EQ(SetScanout(0, 1, {0, 0, 256, 255}), kOk);
  EXPECT_EQ(device_->counters().host_bytes, 256u * 4 * 256 + 256u * 4 * 255);
}

TEST_F(SmallBudgetTest, ResourcesAndEntriesAreLimited) {
  for (uint32_t id = 1; id <= 3; ++id) EXPECT_EQ(Create(id, 1, 1), kOk);
  EXPECT_EQ(Create(4, 1, 1), kErrOutOfMemory);
  std::vector<WireEntry> entries(5, {kRam, 4});
  EXPECT_EQ(Attach(1, entries), kErrUnspec);
  entries.pop_back();
  EXPECT_EQ(Attach(1, entries), kOk);
}

class PinLimitTest : public GpuTest {
 protected:
  PinLimitTest() : GpuTest({}, /*pin_limit_pages=*/8) {}
};

TEST_F(PinLimitTest, BeyondThePinLimitTheGuestGetsACleanError) {
  ASSERT_EQ(Create(1, 64, 64), kOk);
  EXPECT_EQ(AttachRam(1, 0, 9 * 4096), kErrOutOfMemory);
  EXPECT_EQ(PinnedPages(), 0u);
  EXPECT_EQ(AttachRam(1, 0, 8 * 4096), kOk);
}

class GpuDeviceCreateTest : public GpuTest {};

TEST_F(GpuDeviceCreateTest, ImpossibleConfigurationsAreRefused) {
  using mvgpu::testing::FailsWith;
  const auto create = [this](GpuConfig config) {
    return GpuDevice::Create(config, &*cache_, &*domain_, nullptr, nullptr);
  };
  EXPECT_THAT(create({}), mvgpu::testing::IsOk());
  EXPECT_THAT(create({.scanouts = 0}), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(create({.scanouts = 16}), mvgpu::testing::IsOk());
  EXPECT_THAT(create({.scanouts = 17}), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(create({.preferred_mode = {639, 480}}), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(create({.preferred_mode = {4096, 2160}}), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(create({.preferred_mode = {1920, 1080}, .largest_mode = {1280, 1024}}),
              FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(create({.max_resources = 0}), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(create({.max_backing_entries = 0}), FailsWith(ErrorCode::kInvalid));
}

}  // namespace
}  // namespace mvgpu::gpu
